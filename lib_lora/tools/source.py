"""A model on disk that a job reads: which of its files hold weights, which are copied, and which are not meant."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.core.checkpoint import COMPONENTS, model_files, model_keymap
from lib_lora.core.files import read_header
from lib_lora.core.header import CHECKPOINT_LIMITS
from lib_lora.core.model_folder import weight_files
from lib_lora.core.opening import shown
from lib_lora.core.pickles import convert_pickle
from lib_lora.core.replacing import scratch_file
from lib_lora.errors import ModelError, PickleRefusedError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from lib_lora.core.keymap import KeyMap

CONVERT_SECONDS = 1800.0
"""For a pickle of several GB on a busy disk."""
VAE = "vae"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")


@dataclass(frozen=True)
class ModelSource:
    """A single-file checkpoint or a diffusers folder.

    Attributes:
        path: Where it is.
        weights: Its .safetensors files of the UNet, the text encoders and the VAE.
        others: What else a folder needs.
        left: Weights in the folder that say the same as others, and would not be changed with them.
        keymap: Its layers.
    """

    path: Path
    weights: tuple[Path, ...]
    others: tuple[Path, ...]
    left: tuple[Path, ...]
    keymap: KeyMap

    @property
    def is_folder(self) -> bool:
        """Whether each file holds a part."""
        return self.path.is_dir()


@contextmanager
def open_model(model: Path, folder: Path) -> Generator[ModelSource]:
    """Look at the files of a model.

    Args:
        model: A .safetensors file, a pickle (.ckpt), or a diffusers folder.
        folder: Where a pickle's tensors are kept as .safetensors until the block ends.

    Raises:
        FileError: If a file can not be read.
        ModelError: If it is no model of a known structure, or a part of it is a pickle only.
    """
    if not model.is_file() or not _is_pickle(model):
        yield _source(model, model)
        return
    with scratch_file(folder) as converted:
        convert_pickle(model, converted, timeout_s=CONVERT_SECONDS)
        yield _source(converted, model)


def _is_pickle(file: Path) -> bool:
    try:
        read_header(file, CHECKPOINT_LIMITS)
    except PickleRefusedError:
        return True
    return False


def _source(path: Path, model: Path) -> ModelSource:
    weights = model_files(path)
    keymap = model_keymap(path)
    if not len(keymap):
        raise ModelError(
            f"{shown(model)} is no checkpoint: none of its tensors is a layer of a UNet or a text encoder by its name"
        )
    if path.is_file():
        return ModelSource(path, tuple(weights), (), (), keymap)
    if any((path / VAE).glob("*.safetensors")):
        weights += weight_files(path / VAE)
    found = sorted(file for file in (*path.glob("*"), *path.glob("*/**/*")) if file.is_file())
    rest = [file for file in found if file not in weights and not _is_hidden(file, path)]
    left = [file for file in rest if _is_left(file, path)]
    _refuse_pickled_parts(left, weights, model)
    return ModelSource(path, tuple(weights), tuple(file for file in rest if file not in left), tuple(left), keymap)


def _is_hidden(file: Path, folder: Path) -> bool:
    """What git and download caches keep there."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _is_left(file: Path, folder: Path) -> bool:
    if file.parent == folder:
        return file.suffix in (*PICKLES, ".safetensors")
    return file.parent.name in (*COMPONENTS, VAE) and file.suffix in (*PICKLES, ".safetensors")


def _refuse_pickled_parts(left: list[Path], weights: list[Path], model: Path) -> None:
    parts = {file.parent for file in weights}
    for file in left:
        if file.parent.name in COMPONENTS and file.parent not in parts:
            part = f"{shown(model)}/{file.parent.name}"
            raise ModelError(f"{part} has no .safetensors weights, only {shown(file)}; save it in that format")
