"""The files that a model is converted from: those of a diffusers folder are whole or in shards, or a variant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lib_lora.core.files import map_checkpoint
from lib_lora.core.opening import FileIdentity, shown
from lib_lora.errors import FileChangedError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lib_lora.core.saving import Progress

KEPT_BYTES = 256 << 20
"""So much of what was read may stay in memory."""

# diffusers writes the variant before the shard's number since 0.30, and behind it before.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-(?P<shards>\d{5}))?(?:\.(?P<old>\w+))?"
    r"\.safetensors"
)


def weight_files(part: Path, variant: str | None = None) -> list[Path]:
    """The .safetensors files of one part, such as ``unet``.

    Args:
        part: The folder.
        variant: Such as ``fp16``; None for the weights without one, or for the only variant that is there.

    Raises:
        ModelError: If there are none, or shards are missing, or several variants and none was asked for.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    for file in sorted(part.glob("*.safetensors")):
        if match := _WEIGHTS.fullmatch(file.name):
            shards = found.setdefault(match["variant"] or match["old"] or "", {})
            shards.setdefault(match["shards"] or "00001", []).append(file)
    chosen = variant or ("" if "" in found else "".join(found) if len(found) == 1 else None)
    if chosen is None or chosen not in found:
        there = ", ".join(name or "no variant" for name in found) or "none"
        wanted = f"of variant {variant}" if variant else "without a variant"
        raise ModelError(f"{part} holds no .safetensors weights {wanted}; variants there: {there}")
    whole = next((files for count, files in found[chosen].items() if len(files) == int(count)), None)
    if whole is None:
        raise ModelError(f"{part} is incomplete: some of its shards are missing; download them again")
    return whole


class MappedFiles:
    """Files that a long job reads from the first tensor to the last.

    Attributes:
        tensors: By name, of all files: views of mapped memory.
        metadata: The first file's.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read their headers.

        Raises:
            FileError: If a file can not be read.
        """
        self._files = [map_checkpoint(path) for path in paths]
        self.tensors = {name: tensor for file in self._files for name, tensor in file.items()}
        self.metadata = self._files[0].header.metadata

    def watched(self, progress: Progress) -> Progress:
        """`progress` of a job that reads these files, which also gives back the memory of what was read.

        It raises FileChangedError if one of them is written to meanwhile.
        """
        given_back = 0

        def told(done: int, total: int) -> None:
            nonlocal given_back
            for file in self._files:
                path = file.identity.path
                if FileIdentity.of(path) != file.identity:
                    raise FileChangedError(f"{shown(path)} is being written to; try again when that is done")
            if done - given_back > KEPT_BYTES:
                given_back = done
                for file in self._files:
                    for name in file:
                        file.release(name)
            progress(done, total)

        return told
