"""Which layers of a model a network trains, and under what names: chosen as kohya's scripts choose them.

Source: networks/lora.py of sd-scripts: layers in blocks of these classes, whatever the path. Names are those of kohya's
files: the UNet's are diffusers' in SD1 and SD2 and sgm's in SDXL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from lib_lora.core.keymap import KeyMap
from lib_lora.core.lora_names import FAMILIES, kohya_name
from lib_lora.core.models import BaseModel
from lib_lora.train.block_lr import OUTSIDE, layout_of

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence

    from lib_lora.core.layers import LayerRef

_TRANSFORMERS = ("Transformer2DModel",)
_CONVOLUTIONAL = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_TEXT = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")


class Target(NamedTuple):
    """A layer that can be trained.

    Attributes:
        name: Under which kohya's files have it.
        component: ``unet``, ``te1`` or ``te2``.
        module: The layer.
        block: Index of its block (`BlockLayout.index`).
    """

    name: str
    component: str
    module: nn.Linear | nn.Conv2d
    block: int

    @property
    def is_wide(self) -> bool:
        """Whether it is a convolution larger than 1x1."""
        return isinstance(self.module, nn.Conv2d) and self.module.kernel_size != (1, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight: (out, in) or (out, in, kh, kw)."""
        if isinstance(self.module, nn.Linear):
            return (self.module.out_features, self.module.in_features)
        return (self.module.out_channels, self.module.in_channels // self.module.groups, *self.module.kernel_size)


class TrainedModel:
    """The layers of a model that can be trained.

    Attributes:
        components: ``te1``, ``te2``, ``unet`` → module, of those that are trained, text encoders first.
        family: The model's; SD1 stands for one that is not known.
        layout: The UNet's blocks.
    """

    def __init__(self, unet: nn.Module, text_encoders: Sequence[nn.Module], trained: Container[str]) -> None:
        encoders = {f"te{index}": encoder for index, encoder in enumerate(text_encoders, 1)}
        components = {**encoders, "unet": unet}
        self._keymap = KeyMap.from_modules(components)
        self.components = {name: module for name, module in components.items() if name in trained}
        self.family = self._keymap.base_model if self._keymap.base_model in FAMILIES else BaseModel.SD1
        self.layout = layout_of(self.family)

    def targets(self, *, wide: bool) -> Iterator[Target]:
        """Layers of LierLa in kohya's order; if `wide`, of C3Lier."""
        layers = {id(layer.module): layer for layer in self._keymap}
        for component, module in self.components.items():
            kinds = _TEXT if component != "unet" else _TRANSFORMERS + (_CONVOLUTIONAL if wide else ())
            for layer in _inside(module, kinds):
                if id(layer) in layers:
                    yield self._target(layers[id(layer)], layer)

    def find(self, layer: str) -> Target | None:
        """The layer of a file's name (`naming.split_key`), or None if the model has no such Linear or Conv2d."""
        found = self._keymap.find(layer)
        if found is None or not isinstance(found.module, (nn.Linear, nn.Conv2d)) or found.attribute != "weight":
            return None
        return self._target(found, found.module)

    def _target(self, layer: LayerRef, module: nn.Linear | nn.Conv2d) -> Target:
        block = self.layout.index(layer.original) if layer.component == "unet" else OUTSIDE
        return Target(kohya_name(layer.key, self.family), layer.component, module, block)


def _inside(root: nn.Module, kinds: Iterable[str]) -> Iterator[nn.Linear | nn.Conv2d]:
    """The Linear and Conv2d layers in blocks of these classes, each once."""
    seen: set[int] = set()
    for block in root.modules():
        if type(block).__name__ in kinds:
            for layer in block.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)) and id(layer) not in seen:
                    seen.add(id(layer))
                    yield layer
