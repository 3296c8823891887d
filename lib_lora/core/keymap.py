"""Model → KeyMap: all spellings of a layer lead to one LayerRef, by lookup."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from torch import nn

from lib_lora.core.blocks import block_of
from lib_lora.core.layers import LayerRef
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import BIAS, CONTROLNETS, WRAPPERS, layer_name
from lib_lora.core.places import places_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lib_lora.core.mmdit_names import Rows
    from lib_lora.core.places import Place

_WEIGHTS = ("weight", "in_proj_weight")
_BIASES = ("bias", "in_proj_bias")
_SINGLE_FILE_PREFIXES = (
    ("model.diffusion_model.", "unet"),
    ("cond_stage_model.", "te1"),  # SD1, SD2
    ("conditioner.embedders.0.transformer.", "te1"),  # SDXL
    ("conditioner.embedders.1.model.", "te2"),
    ("conditioner.embedders.0.model.", "te2"),  # SDXL's refiner
    ("text_encoders.clip_l.", "te1"),  # SD3, Flux
    ("text_encoders.clip_g.", "te2"),
    ("text_encoders.t5xxl.", "te3"),
)
_BARE_TRANSFORMERS = ("double_blocks.0.", "joint_blocks.0.")
"""Names in checkpoints that hold a transformer alone, without any prefix, such as the one Flux was published as."""


class _Weight(NamedTuple):
    """One weight or bias of a component; `name` is its full name there or in the checkpoint."""

    name: str
    shape: tuple[int, ...]
    module: nn.Module | None = None


class Part(NamedTuple):
    """Where a layer of a LoRA file acts in a model.

    Attributes:
        layer: A layer of the model.
        rows: Which rows of the file's layer act there, in the order of the model's; empty for all, as they are.
        is_copy: Whether the layer is another component's copy of the one that is named.
    """

    layer: LayerRef
    rows: tuple[Rows, ...] = ()
    is_copy: bool = False


class KeyMap:
    """The layers of a model, found by any of their names.

    Iterating gives every weight once, in the model's order: of Linear, Conv2d, the parts of a MultiheadAttention,
    norms and embeddings. Their biases are places of their own, behind them (`parameters`).

    Attributes:
        components: Names of the components that have layers: ``unet`` or ``transformer``, ``te1``, ``te2``, ``te3``,
            ``controlnet``, ``controlnet_2``, ….
        base_model: The model's family.
        control_follows: Whether the name of a UNet's layer means the ControlNets' copies of it too.
    """

    def __init__(self, weights: Mapping[str, Sequence[_Weight]], *, control_follows: bool = False) -> None:
        self._layers: dict[str, LayerRef] = {}
        self._biases: dict[str, LayerRef] = {}
        self._spellings: dict[str, list[Part]] = {}
        for component, entries in weights.items():
            self._add(component, entries)
        self.control_follows = control_follows
        if control_follows:
            self._follow()
        self.components = tuple(dict.fromkeys(layer.component for layer in self))
        self.base_model = BaseModel.of_model(
            {layer_name(layer.component, layer.key.partition(".")[2]): layer.shape for layer in self}
        )

    @classmethod
    def from_modules(cls, components: Mapping[str, nn.Module], *, control_follows: bool = False) -> KeyMap:
        """Layers of a live model.

        Args:
            components: ``unet``, ``te1``, ``te2``, ``te3``, ``transformer`` → module; diffusers, transformers, LDM,
                open_clip, or SD3's or Flux's original code, also wrapped.
            control_follows: See above.
        """
        weights = {component: list(_live_weights(module)) for component, module in components.items()}
        return cls(weights, control_follows=control_follows)

    @classmethod
    def from_checkpoint(cls, shapes: Mapping[str, Sequence[int]]) -> KeyMap:
        """Layers of a single-file checkpoint; `LayerRef.parameter` is the checkpoint's own key.

        Args:
            shapes: Every tensor's name → shape.
        """
        if any(name.startswith(_BARE_TRANSFORMERS) for name in shapes):
            return cls.from_components({"unet": shapes})
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
            components: ``unet``, ``te1``, ``te2``, ``te3``, ``transformer`` → names and shapes of its tensors.
        """
        return cls(
            {
                component: [_Weight(name, tuple(shape)) for name, shape in shapes.items()]
                for component, shapes in components.items()
            }
        )

    def find(self, layer: str) -> LayerRef | None:
        """The layer of a name as `naming.split_key` gives it, or None if the model has none, or several (`parts`)."""
        parts = self.parts(layer)
        return parts[0].layer if len(parts) == 1 else None

    def parts(self, layer: str) -> Sequence[Part]:
        """Where a layer of a file acts, by its name; several layers where it is one weight there and not here."""
        return self._spellings.get(_common(layer), ())

    @property
    def parameters(self) -> Sequence[LayerRef]:
        """All weights, then all biases."""
        return [*self._layers.values(), *self._biases.values()]

    def __iter__(self) -> Iterator[LayerRef]:
        return iter(self._layers.values())

    def __len__(self) -> int:
        return len(self._layers)

    def _add(self, component: str, entries: Iterable[_Weight]) -> None:
        entries = list(entries)
        weights = {path: weight for weight in entries if (path := _path(weight.name, _WEIGHTS))}
        biases = {path: weight for weight in entries if (path := _path(weight.name, _BIASES))}
        for place in places_of(component, {path: weight.shape for path, weight in weights.items()}):
            layer = _layer(component, place, weights[place.source])
            if self._layers.setdefault(layer.key, layer) is not layer:
                continue
            bias = _layer(component, place, biases[place.source], BIAS) if place.source in biases else None
            if bias is not None:
                self._biases[bias.key] = bias
            for spelling in place.spellings:
                name = _common(layer_name(component, spelling.path))
                self._spell(name, Part(layer, spelling.rows))
                if bias is not None:
                    self._spell(name + BIAS, Part(bias, spelling.rows))

    def _follow(self) -> None:
        """A ControlNet's layer is a copy of the UNet's that has its path and shape."""
        layers = self._layers | self._biases
        found: dict[LayerRef, list[Part]] = {}
        for layer in layers.values():
            original = layers.get(f"unet.{layer.key.partition('.')[2]}") if layer.component in CONTROLNETS else None
            if original is not None and original.shape == layer.shape:
                found.setdefault(original, []).append(Part(layer, is_copy=True))
        for parts in self._spellings.values():
            parts.extend(found.get(parts[0].layer, ()))

    def _spell(self, name: str, part: Part) -> None:
        parts = self._spellings.setdefault(name, [])
        if part.rows or not parts:
            parts.append(part)


def _common(layer: str) -> str:
    """One name of layers that are in this component for one trainer, and in that for another."""
    component, _, path = layer.partition(":")
    if component == "transformer":
        return f"unet:{path}"
    return f"te3:{path}" if component == "te2" and path.startswith("encoder_block_") else layer


def _path(name: str, attributes: Sequence[str]) -> str:
    """Path of the layer that a parameter belongs to, without wrappers, or nothing for others and for LoRA layers."""
    *parts, attribute = name.split(".")
    if attribute not in attributes or any(part.startswith("lora_") for part in parts):
        return ""
    kept = [part for part in parts if part not in WRAPPERS]
    return ".".join([*kept, "in_proj"] if attribute.startswith("in_proj") else kept)


def _layer(component: str, place: Place, weight: _Weight, tail: str = "") -> LayerRef:
    shape = weight.shape
    if place.rows is not None:
        shape = (place.rows[1] - place.rows[0], *shape[1:])
    return LayerRef(
        key=f"{component}.{place.path}{tail}",
        component=component,
        block=block_of(component, place.ldm),
        shape=shape,
        parameter=weight.name,
        rows=place.rows,
        module=weight.module,
        attribute=weight.name.rpartition(".")[2],
        original=place.ldm or place.path,
    )


def _live_weights(root: nn.Module) -> Iterator[_Weight]:
    modules = cast("Iterable[tuple[str, nn.Module]]", root.named_modules())
    for path, module in modules:
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for attribute in (*_WEIGHTS, *_BIASES):
            if attribute in tensors:
                shape = tuple(tensors[attribute].shape)
                if isinstance(module, nn.Linear) and attribute == "weight":
                    # A quantised Linear's weight is packed; its features are the layer's shape.
                    shape = (module.out_features, module.in_features)
                yield _Weight(f"{path}.{attribute}" if path else attribute, shape, module)
