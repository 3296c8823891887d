"""Model → KeyMap: all spellings of a layer lead to one LayerRef, by lookup."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from torch import nn

from lib_lora.core.blocks import block_of
from lib_lora.core.layers import LayerRef
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import WRAPPERS, layer_name
from lib_lora.core.places import places_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lib_lora.core.places import Place

_ATTRIBUTES = ("weight", "in_proj_weight")
_SINGLE_FILE_PREFIXES = (
    ("model.diffusion_model.", "unet"),
    ("cond_stage_model.", "te1"),  # SD1, SD2
    ("conditioner.embedders.0.transformer.", "te1"),  # SDXL
    ("conditioner.embedders.1.model.", "te2"),
    ("conditioner.embedders.0.model.", "te2"),  # SDXL's refiner
)


class _Weight(NamedTuple):
    """One weight of a component; `name` is its full name there or in the checkpoint."""

    name: str
    shape: tuple[int, ...]
    module: nn.Module | None = None


class KeyMap:
    """The layers of a model, found by any of their names.

    Iterating gives every layer once, in the model's order: Linear, Conv2d, the parts of a MultiheadAttention,
    norms and embeddings.

    Attributes:
        components: Names of the components that have layers: ``unet``, ``te1``, ``te2``, ``transformer``.
        base_model: The model's family.
    """

    def __init__(self, weights: Mapping[str, Sequence[_Weight]]) -> None:
        self._layers: dict[str, LayerRef] = {}
        self._spellings: dict[str, LayerRef] = {}
        for component, entries in weights.items():
            self._add(component, entries)
        self.components = tuple(dict.fromkeys(layer.component for layer in self))
        self.base_model = BaseModel.of_model(
            {layer_name(layer.component, layer.key.partition(".")[2]): layer.shape for layer in self}
        )

    @classmethod
    def from_modules(cls, components: Mapping[str, nn.Module]) -> KeyMap:
        """Layers of a live model.

        Args:
            components: ``unet``, ``te1``, ``te2`` → module; diffusers, transformers, LDM or open_clip, also wrapped.
        """
        return cls({component: list(_live_weights(module)) for component, module in components.items()})

    @classmethod
    def from_checkpoint(cls, shapes: Mapping[str, Sequence[int]]) -> KeyMap:
        """Layers of a single-file checkpoint (SD1, SD2, SDXL); `LayerRef.parameter` is the checkpoint's own key.

        Args:
            shapes: Every tensor's name → shape.
        """
        split: dict[str, dict[str, Sequence[int]]] = {}
        for name, shape in shapes.items():
            for prefix, component in _SINGLE_FILE_PREFIXES:
                if name.startswith(prefix):
                    split.setdefault(component, {})[name] = shape
        return cls.from_components(split)

    @classmethod
    def from_components(cls, components: Mapping[str, Mapping[str, Sequence[int]]]) -> KeyMap:
        """Layers of a checkpoint in several files, such as diffusers' folders.

        Args:
            components: ``unet``, ``te1``, ``te2`` → names and shapes of its tensors.
        """
        return cls(
            {
                component: [_Weight(name, tuple(shape)) for name, shape in shapes.items()]
                for component, shapes in components.items()
            }
        )

    def find(self, layer: str) -> LayerRef | None:
        """The layer of a name as `naming.split_key` gives it, or None if the model has none."""
        return self._spellings.get(layer)

    def __iter__(self) -> Iterator[LayerRef]:
        return iter(self._layers.values())

    def __len__(self) -> int:
        return len(self._layers)

    def _add(self, component: str, entries: Iterable[_Weight]) -> None:
        weights = {path: weight for weight in entries if (path := _path(weight.name))}
        for place in places_of(component, list(weights)):
            layer = _layer(component, place, weights[place.source])
            if self._layers.setdefault(layer.key, layer) is layer:
                for spelling in place.spellings:
                    self._spellings.setdefault(layer_name(component, spelling), layer)


def _path(name: str) -> str:
    """Path of the layer that a weight belongs to, without wrappers, or nothing for biases, buffers and LoRA layers."""
    *parts, attribute = name.split(".")
    if attribute not in _ATTRIBUTES or any(part.startswith("lora_") for part in parts):
        return ""
    kept = [part for part in parts if part not in WRAPPERS]
    return ".".join([*kept, "in_proj"] if attribute == "in_proj_weight" else kept)


def _layer(component: str, place: Place, weight: _Weight) -> LayerRef:
    rows, shape = None, weight.shape
    if place.third is not None:
        height = shape[0] // 3
        rows, shape = (place.third * height, (place.third + 1) * height), (height, *shape[1:])
    return LayerRef(
        key=f"{component}.{place.path}",
        component=component,
        block=block_of(component, place.ldm),
        shape=shape,
        parameter=weight.name,
        rows=rows,
        module=weight.module,
        attribute=weight.name.rpartition(".")[2],
    )


def _live_weights(root: nn.Module) -> Iterator[_Weight]:
    modules = cast("Iterable[tuple[str, nn.Module]]", root.named_modules())
    for path, module in modules:
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for attribute in _ATTRIBUTES:
            if attribute in tensors:
                # A quantised Linear's weight is packed; its features are the layer's shape.
                linear = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None
                shape = linear or tuple(tensors[attribute].shape)
                yield _Weight(f"{path}.{attribute}" if path else attribute, shape, module)
