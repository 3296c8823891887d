"""A DyLoRA file as one LoRA for each of its ranks.

Source: kohya's extract_lora_from_dylora.py, whose slices and metadata these are; its files carry hashes of other files.
It leaves alpha as it is, so that alpha / rank grows. Files that were trained here say that their ranks are used at the
scale of the whole (`SCALE`), as ``dyn=`` uses those of any file: theirs is made smaller with the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lib_lora.core.files import read_lora_file
from lib_lora.core.naming import split_key
from lib_lora.core.network import network_from_file
from lib_lora.core.saving import check_output, file_size, no_progress, save_tensors
from lib_lora.errors import JobError
from lib_lora.tools.metadata import network_facts, sshs_hashes
from lib_lora.tools.outcome import Outcome, shapes_only
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.files import LoraFile
    from lib_lora.core.network import Network
    from lib_lora.core.saving import Progress

SCALE = {"prefuse.dylora_scale": "whole"}
"""In the metadata of a DyLoRA whose first ranks are meant at the scale alpha / rank of the whole."""


@dataclass(frozen=True, kw_only=True)
class DyloraSplit(Outcome):
    """The LoRAs of a DyLoRA, by rank, ascending.

    Attributes:
        ranks: Of the files.
        rank: Of the source.
        layers: How many each has.
        base_model: The family that they are for.
    """

    ranks: tuple[int, ...]
    rank: int
    layers: int
    base_model: str

    def __str__(self) -> str:
        """For people."""
        lines = [f"{path}, rank {rank}" for path, rank in zip(self.paths, self.ranks, strict=True)]
        whole = f"{self.size_text()} in all, {self.layers} layers; rank {self.rank} is the whole file"
        return "\n".join([*lines, whole, *self.preview_lines()])


def split_dylora(
    lora: Path,
    out: Path,
    unit: int,
    *,
    overwrite: bool = False,
    preview: bool = False,
    progress: Progress = no_progress,
) -> DyloraSplit:
    """Write one LoRA for each rank below that of a DyLoRA: the first 1, 2, … units of its ranks.

    Args:
        lora: A file of DyLoRA; alpha stays if kohya's networks.dylora has trained it.
        out: What the files' names begin with: ``out.safetensors`` gives ``out-0004.safetensors``, and so on.
        unit: Ranks that were trained together.
        overwrite: Whether older files are replaced.
        preview: Whether all is checked and nothing is written.
        progress: Told the bytes hashed and written.

    Raises:
        FileError: If a file can not be read or written; those that this job has added are removed then.
        NamingError, AdapterError, NonFiniteError: If the file is no good LoRA.
        JobError: If `unit` does not divide its rank, or it has layers without ranks, or of different ranks.
    """
    work = Work(progress)
    file = read_lora_file(lora)
    network = network_from_file(file)
    whole = _rank(file, network, unit)
    ranks = tuple(range(unit, whole, unit))
    parts = [_Part(file, out.with_name(f"{out.stem}-{rank:04d}.safetensors"), rank, whole) for rank in ranks]
    paths, size = tuple(part.path for part in parts), sum(part.size for part in parts)
    *_, disk = (check_output(path, size, overwrite=overwrite) for path in paths)
    metadata = parts[0].metadata(shapes_only(parts[0].tensors()))
    if not preview:
        work.expect(file.identity.size + 2 * size)
        work.add(file.identity.size)
        metadata, *_ = _write(parts, work, overwrite)
    return DyloraSplit(
        paths=paths,
        size=size,
        disk=disk,
        metadata=metadata,
        written=not preview,
        ranks=ranks,
        rank=whole,
        layers=len(network.adapters),
        base_model=network.base_model.value,
    )


@dataclass(frozen=True)
class _Part:
    """One of the new files: the first `rank` ranks of a file that has `whole`."""

    file: LoraFile
    path: Path
    rank: int
    whole: int

    @cached_property
    def size(self) -> int:
        """Bytes."""
        tensors = shapes_only(self.tensors())
        return file_size(self.path, tensors, self.metadata(tensors))

    @property
    def keeps_scale(self) -> bool:
        """Whether alpha / rank stays, and not alpha."""
        return SCALE.items() <= self.file.metadata.items()

    def tensors(self) -> dict[str, Tensor]:
        """Views of the source's; an alpha that changes is float32."""
        share = self.rank / self.whole if self.keeps_scale else 1.0
        return {key: _slice(key, tensor, self.rank, share) for key, tensor in self.file.tensors.items()}

    def metadata(self, tensors: Mapping[str, Tensor], progress: Progress = no_progress) -> dict[str, str]:
        """The source's, as kohya changes it, with hashes of this file; `progress` is told the bytes that are hashed."""
        comment = f"split from DyLoRA, rank {self.whole} to {self.rank}; "
        comment += self.file.metadata.get("ss_training_comment", "")
        metadata = dict(self.file.metadata) | {"ss_training_comment": comment, "ss_network_dim": str(self.rank)}
        if self.keeps_scale:
            metadata["ss_network_alpha"] = network_facts(tensors)["ss_network_alpha"]
        return metadata | sshs_hashes(tensors, metadata, progress)


def _write(parts: Sequence[_Part], work: Work, overwrite: bool) -> list[dict[str, str]]:
    """All files or none; gives back their metadata."""
    said: list[dict[str, str]] = []
    added = [part.path for part in parts if not part.path.exists()]
    try:
        for part in parts:
            tensors = part.tensors()
            said.append(part.metadata(tensors, work.stage(part.size)))
            save_tensors(part.path, tensors, said[-1], overwrite=overwrite, progress=work.stage(part.size))
    except BaseException:
        for path in added:
            path.unlink(missing_ok=True)
        raise
    return said


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


def _slice(key: str, tensor: Tensor, rank: int, share: float) -> Tensor:
    """The first ranks of a factor, that share of an alpha; another tensor as it is."""
    parts = split_key(key)
    if parts is None or (parts.role == "alpha" and share == 1):
        return tensor
    if parts.role == "alpha":
        return tensor.float() * share
    return tensor[:, :rank] if parts.role == "lora_up" else tensor[:rank]
