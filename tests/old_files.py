"""An old file that is to be replaced, and what is in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lib_lora.core import large_writes, replacing
from lib_lora.core.saving import save_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

OLD, NEW = {"old": torch.arange(5000.0)}, {"new": torch.arange(20_000.0), "more": torch.ones(3, dtype=torch.float16)}
SMALL_BLOCK = 8192  # bytes; disks take multiples of their sectors only


def old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> Path:
    """An old file, alone in its folder; files are written as small ones, or in blocks as large ones."""
    if kind == "large":
        monkeypatch.setattr(replacing, "LARGE_BYTES", 1)
        monkeypatch.setattr(large_writes, "BLOCK_BYTES", SMALL_BLOCK)
    folder = tmp_path / "out"
    folder.mkdir()
    save_tensors(folder / "lora.safetensors", OLD)
    return folder / "lora.safetensors"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(item.relative_to(folder)): item.read_bytes() if item.is_file() else None for item in folder.rglob("*")}
