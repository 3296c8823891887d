"""The weights of one part of a diffusers folder: whole or in shards, in full precision or in a variant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lib_lora.core.files import map_checkpoint
from lib_lora.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

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


def part_tensors(part: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of one part by name, views of mapped files.

    Args:
        part: The folder.
        variant: See `weight_files`.

    Raises:
        ModelError: See `weight_files`.
        FileError: If a file can not be read.
    """
    return {name: tensor for file in weight_files(part, variant) for name, tensor in map_checkpoint(file).items()}
