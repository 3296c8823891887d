"""The layers of a live model in the files it was loaded from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.core.files import map_checkpoint
from lib_lora.core.keymap import KeyMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.layers import LayerRef

_FOLDERS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2", "transformer": "transformer"}
"""A file in one of these folders holds that component alone, as diffusers saves models."""


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
    component = _FOLDERS.get(file.parent.name)
    keymap = KeyMap.from_components({component: shapes}) if component else KeyMap.from_checkpoint(shapes)
    for layer in keymap.parameters:
        yield layer, _rows(tensors, layer)


def _rows(tensors: Mapping[str, Tensor], layer: LayerRef) -> Tensor:
    tensor = tensors[layer.parameter]
    return tensor if layer.rows is None else tensor[layer.rows[0] : layer.rows[1]]
