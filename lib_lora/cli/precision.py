"""``--save-precision``: the type of what is saved, in kohya's words."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    import torch

PRECISIONS = MappingProxyType({"float": "float32", "fp16": "float16", "bf16": "bfloat16"})


def save_precision(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument("--save-precision", choices=PRECISIONS, help="type of the numbers (default: as they come)")


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type of that name, or None for None."""
    import torch

    return None if name is None else getattr(torch, PRECISIONS[name])
