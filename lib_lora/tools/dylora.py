"""A DyLoRA file as one LoRA for each of its ranks.

Source: kohya's extract_lora_from_dylora.py, whose slices and metadata these are; its files carry hashes of other files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lib_lora.core.files import read_lora_file
from lib_lora.core.naming import split_key
from lib_lora.core.network import network_from_file
from lib_lora.core.saving import check_output, no_progress, save_tensors
from lib_lora.errors import JobError
from lib_lora.tools.metadata import sshs_hashes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.files import LoraFile
    from lib_lora.core.network import Network
    from lib_lora.core.saving import Progress


@dataclass(frozen=True)
class DyloraSplit:
    """The LoRAs of a DyLoRA.

    Attributes:
        paths: By rank, ascending.
        ranks: Of the files.
        rank: Of the source.
    """

    paths: tuple[Path, ...]
    ranks: tuple[int, ...]
    rank: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"paths": [str(path) for path in self.paths]}

    def __str__(self) -> str:
        """For people."""
        lines = [f"{path}, rank {rank}" for path, rank in zip(self.paths, self.ranks, strict=True)]
        return "\n".join([*lines, f"rank {self.rank} is the whole file"])


def split_dylora(
    lora: Path, out: Path, unit: int, *, overwrite: bool = False, progress: Progress = no_progress
) -> DyloraSplit:
    """Write one LoRA for each rank below that of a DyLoRA: the first 1, 2, … units of its ranks; alpha stays.

    Args:
        lora: A file that kohya's networks.dylora has trained.
        out: What the files' names begin with: ``out.safetensors`` gives ``out-0004.safetensors``, and so on.
        unit: Ranks that were trained together.
        overwrite: Whether older files are replaced.
        progress: Told the files done.

    Raises:
        FileError: If a file can not be read or written; those that this job has added are removed then.
        NamingError, AdapterError, NonFiniteError: If the file is no good LoRA.
        JobError: If `unit` does not divide its rank, or it has layers without ranks, or of different ranks.
    """
    file = read_lora_file(lora)
    network = network_from_file(file)
    whole = _rank(file, network, unit)
    ranks = range(unit, whole, unit)
    paths = tuple(out.with_name(f"{out.stem}-{rank:04d}.safetensors") for rank in ranks)
    for path in paths:
        check_output(path, file.identity.size * sum(ranks) // whole, overwrite=overwrite)
    added = [path for path in paths if not path.exists()]
    try:
        for done, (path, rank) in enumerate(zip(paths, ranks, strict=True), 1):
            tensors = {key: _slice(key, tensor, rank) for key, tensor in file.tensors.items()}
            save_tensors(path, tensors, _metadata(file, tensors, rank, whole), overwrite=overwrite)
            progress(done, len(paths))
    except BaseException:
        for path in added:
            path.unlink(missing_ok=True)
        raise
    return DyloraSplit(paths, tuple(ranks), whole)


def _rank(file: LoraFile, network: Network, unit: int) -> int:
    """Rank of the whole file."""
    name = file.path.name
    roles = {parts.role for key in file.tensors if (parts := split_key(key))}
    if roles - {"alpha"} != {"lora_up", "lora_down"}:
        raise JobError(f"{name} is no DyLoRA: it holds {', '.join(sorted(roles)) or 'no layers'}")
    if len(network.ranks) != 1:
        raise JobError(f"{name} is no DyLoRA: its layers have the ranks {', '.join(map(str, network.ranks)) or '0'}")
    (rank,) = network.ranks
    if unit < 1 or rank % unit or unit == rank:
        fitting = ", ".join(str(number) for number in range(1, rank) if rank % number == 0)
        raise JobError(f"{name} has rank {rank}, which has no parts of {unit}; units are {fitting or 'none'}")
    return rank


def _slice(key: str, tensor: Tensor, rank: int) -> Tensor:
    """The first ranks of a factor; another tensor as it is."""
    parts = split_key(key)
    if parts is None or parts.role == "alpha":
        return tensor
    return tensor[:, :rank] if parts.role == "lora_up" else tensor[:rank]


def _metadata(file: LoraFile, tensors: Mapping[str, Tensor], rank: int, whole: int) -> dict[str, str]:
    """The source's, as kohya changes it, with hashes of this file."""
    comment = f"split from DyLoRA, rank {whole} to {rank}; {file.metadata.get('ss_training_comment', '')}"
    own = {"ss_training_comment": comment, "ss_network_dim": str(rank)}
    metadata = dict(file.metadata) | own
    return metadata | sshs_hashes(tensors, metadata)
