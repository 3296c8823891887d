"""The layers of a live model in the files it was loaded from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.core.files import map_checkpoint
from lib_lora.core.keymap import KeyMap
from lib_lora.core.model_folder import weight_files
from lib_lora.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.layers import LayerRef

COMPONENTS = {
    "unet": "unet",
    "text_encoder": "te1",
    "text_encoder_2": "te2",
    "text_encoder_3": "te3",
    "transformer": "transformer",
}
"""A file in one of these folders holds that component alone, as diffusers saves models."""


def model_files(model: Path) -> list[Path]:
    """The .safetensors files of a model: itself, or those of a diffusers folder, one variant of each part.

    Raises:
        ModelError: If there are none, or it can not be told which of them are meant.
    """
    parts = [part for name in COMPONENTS if any((part := model / name).glob("*.safetensors"))]
    files = [model] if model.is_file() else [file for part in parts for file in weight_files(part)]
    if not files:
        raise ModelError(f"{model} is no .safetensors checkpoint and no diffusers folder that holds such files")
    return files


def component_of(file: Path) -> str | None:
    """The component that a file of a diffusers folder holds, or None for a file of a whole model."""
    return COMPONENTS.get(file.parent.name)


def model_keymap(model: Path) -> KeyMap:
    """Layers of a model on disk; only the headers of its files are read.

    Raises:
        FileError: If a file can not be read.
        ModelError: If the model has no such files.
    """
    components: dict[str, dict[str, tuple[int, ...]]] = {}
    for file in model_files(model):
        shapes = {name: info.shape for name, info in map_checkpoint(file).header.tensors.items()}
        if (component := component_of(file)) is None:
            return KeyMap.from_checkpoint(shapes)
        components.setdefault(component, {}).update(shapes)
    return KeyMap.from_components(components)


def layer_tensors(layers: Iterable[LayerRef], files: Sequence[Path]) -> dict[str, Tensor]:
    """Find the weights of a live model in .safetensors files, whichever names they have there.

    Args:
        layers: The model's layers.
        files: One single-file checkpoint, or the files of a diffusers folder.

    Returns:
        `LayerRef.key` → view of the memory-mapped tensor, rows of a fused weight cut out. Layers that no file has are
        missing.

    Raises:
        FileError: If a file can not be read.
    """
    found = {layer.key: tensor for file in files for layer, tensor in _layers_in(file)}
    return {layer.key: found[layer.key] for layer in layers if layer.key in found}


def _layers_in(file: Path) -> Iterator[tuple[LayerRef, Tensor]]:
    tensors = map_checkpoint(file)
    shapes = {name: info.shape for name, info in tensors.header.tensors.items()}
    component = component_of(file)
    keymap = KeyMap.from_components({component: shapes}) if component else KeyMap.from_checkpoint(shapes)
    for layer in keymap.parameters:
        yield layer, _rows(tensors, layer)


def _rows(tensors: Mapping[str, Tensor], layer: LayerRef) -> Tensor:
    tensor = tensors[layer.parameter]
    return tensor if layer.rows is None else tensor[layer.rows[0] : layer.rows[1]]
