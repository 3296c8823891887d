"""Engines on the disk, for the same block, form of call, versions and GPU alone; a damaged one is built again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.saving import save_bytes
from lib_lora.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from lib_lora.compile.forms import CallForm
    from lib_lora.compile.tensorrt_package import Package

DIGEST_BYTES = 32


def cache_folder(root: Path | None, block: nn.Module, form: CallForm, package: Package) -> Path | None:
    """Where engines of a block are kept; None without `root`, or where no folder can be made.

    The package's own key is of the graph's operations and inputs, and the same for two blocks of other widths.
    """
    if root is None:
        return None
    weights = [(name, tuple(weight.shape), weight.dtype) for name, weight in block.named_parameters()]
    gpu = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    known = (repr(block), weights, form, torch.__version__, package.versions, gpu)
    folder = root / hashlib.sha256(repr(known).encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def engine_cache(package: Package, folder: Path) -> Any:
    """A cache as the package wants it, in a folder of its own.

    What it gives to the package is what the package gave to it: each file begins with the SHA-256 of the rest, and one
    where that is not so counts as none.
    """

    class EngineFolder(package.cache):
        def __init__(self) -> None:
            """Nothing to prepare."""

        def save(self, hash: str, blob: bytes, *args: Any, **kwargs: Any) -> None:  # noqa: A002 -- the package's name
            save_engine(_path(folder, hash), blob)

        def load(self, hash: str, *args: Any, **kwargs: Any) -> bytes | None:  # noqa: A002
            return load_engine(_path(folder, hash))

    return EngineFolder()


def save_engine(path: Path, blob: bytes) -> None:
    """Write an engine; if that can not be, it is built again the next time."""
    try:
        save_bytes(path, hashlib.sha256(blob).digest() + blob, overwrite=True)
    except OutputError:
        return


def load_engine(path: Path) -> bytes | None:
    """What was saved, or None if it is not there or not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    blob = data[DIGEST_BYTES:]
    return blob if hashlib.sha256(blob).digest() == data[:DIGEST_BYTES] else None


def _path(folder: Path, name: str) -> Path:
    """The package's keys are several hashes long."""
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.engine"
