"""Layers of two models on disk, and their differences: each is read when it is asked for, and forgotten."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lib_lora.core.checkpoint import component_of, model_files, model_keymap
from lib_lora.core.files import map_checkpoint
from lib_lora.core.lora_names import FAMILIES
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import group_names, layer_name
from lib_lora.core.opening import shown
from lib_lora.errors import BaseModelMismatchError, JobError, ModelError, NonFiniteError, ShapeMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.files import MappedTensors
    from lib_lora.core.keymap import KeyMap
    from lib_lora.core.layers import LayerRef

_TRANSFORMERS = (".attentions.",)
_CONVOLUTIONS = (".resnets.", ".downsamplers.", ".upsamplers.")
_TEXT_ENCODERS = (".self_attn.", ".mlp.")
_UNUSED = "te1.text_model.encoder.layers.23."
"""SD2's single files hold a last layer of the text encoder that nobody computes; diffusers leaves it out."""


@dataclass(frozen=True)
class _Weight:
    """A layer's weight in a file."""

    layer: LayerRef
    tensors: MappedTensors

    def read(self, device: torch.device) -> Tensor:
        """A copy in float32, (out, in·kh·kw)."""
        whole = self.tensors[self.layer.parameter]
        rows = whole if self.layer.rows is None else whole[slice(*self.layer.rows)]
        copy = rows.to(device, torch.float32, copy=True).flatten(1)
        self.tensors.release(self.layer.parameter)
        return copy


@dataclass(frozen=True)
class LayerPair:
    """One layer that two models have.

    Attributes:
        name: As in `naming`: ``component:path``.
        layer: Its place in the first model.
    """

    name: str
    layer: LayerRef
    base: _Weight
    tuned: _Weight

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in·kh·kw)."""
        return self.layer.shape[0], math.prod(self.layer.shape[1:])

    def difference(self, device: torch.device) -> Tensor:
        """Tuned less base, float32, (out, in·kh·kw).

        Raises:
            NonFiniteError: If it holds NaN or infinity.
        """
        base, tuned = self.base.read(device), self.tuned.read(device)
        difference = tuned - base
        if not difference.isfinite().all():
            which = "base" if not base.isfinite().all() else "tuned"
            raise NonFiniteError(f"layer {self.name} of the {which} model holds NaN or infinity; the file is damaged")
        return difference


@dataclass(frozen=True)
class ModelPair:
    """Two models of one family.

    Attributes:
        family: Of both; SD1 where it is not known, for then the names are those of SD1.
        layers: Those that LoRAs are made for, in the first model's order.
        notes: Sentences for the user.
    """

    family: BaseModel
    layers: tuple[LayerPair, ...]
    notes: tuple[str, ...] = ()


def open_pair(base: Path, tuned: Path, *, convolutions: bool) -> ModelPair:
    """The layers of two models that LoRAs are made for; only headers are read.

    Args:
        base: A .safetensors checkpoint or a diffusers folder.
        tuned: The same, also in the other layout.
        convolutions: Whether the layers of residual, down- and upsampling blocks are among them (C3Lier).

    Raises:
        FileError: If a file can not be read.
        ModelError: If a path is no model.
        BaseModelMismatchError: If they are of different families.
        ShapeMismatchError: If a layer's shapes differ.
        JobError: If the family is none that LoRAs can be extracted of, or one of them lacks layers.
    """
    keymaps = model_keymap(base), model_keymap(tuned)
    family = _common_family(*zip((base, tuned), keymaps, strict=True))
    sides = [_lora_layers(keymap, family, convolutions=convolutions) for keymap in keymaps]
    components = [{layer.component for layer in side.values()} for side in sides]
    for path, own in zip((base, tuned), components, strict=True):
        if not own:
            raise ModelError(f"{shown(path)} is no checkpoint of Stable Diffusion: it has no UNet and no text encoder")
    common = components[0] & components[1]
    if not common:
        raise JobError(f"{shown(base)} and {shown(tuned)} have no part in common: the one is UNet, the other is text")
    sides = [{key: layer for key, layer in side.items() if layer.component in common} for side in sides]
    _check_complete(sides, (base, tuned))
    weights = [_weights(side.values(), path) for side, path in zip(sides, (base, tuned), strict=True)]
    pairs = tuple(_pair(layer, weights[0][key], weights[1][key]) for key, layer in sides[0].items())
    alone = sorted(components[0] ^ components[1])
    notes = (f"left out, for only one of the models has it: {', '.join(alone)}",) if alone else ()
    return ModelPair(family, pairs, notes)


def _common_family(base: tuple[Path, KeyMap], tuned: tuple[Path, KeyMap]) -> BaseModel:
    families = {path: keymap.base_model for path, keymap in (base, tuned)}
    first, second = base[1].base_model, tuned[1].base_model
    if not first.compatible(second):
        named = " and ".join(f"{shown(path)} is {family.value}" for path, family in families.items())
        raise BaseModelMismatchError(f"{named}; a LoRA can be extracted of two models of one family only")
    family = second if first is BaseModel.UNKNOWN else first
    if family is BaseModel.UNKNOWN:
        return BaseModel.SD1
    if family not in FAMILIES:
        raise JobError(f"{shown(base[0])} is {family.value}; LoRAs can be extracted of SD1, SD2 and SDXL")
    return family


def _lora_layers(keymap: KeyMap, family: BaseModel, *, convolutions: bool) -> dict[str, LayerRef]:
    """What kohya's trainer makes LoRAs for: LierLa's layers, or C3Lier's."""
    unet = _TRANSFORMERS + _CONVOLUTIONS if convolutions else _TRANSFORMERS
    return {
        layer.key: layer
        for layer in keymap
        if len(layer.shape) > 1
        and any(part in layer.key for part in (unet if layer.component == "unet" else _TEXT_ENCODERS))
        and not (family is BaseModel.SD2 and layer.key.startswith(_UNUSED))
    }


def _check_complete(sides: Sequence[Mapping[str, LayerRef]], paths: Sequence[Path]) -> None:
    for side, other, path in zip(sides, reversed(sides), paths, strict=True):
        missing = [_name(layer) for key, layer in other.items() if key not in side]
        if missing:
            parts = group_names(missing)
            named = "; ".join(f"{part} lacks {count}: {', '.join(first)}" for part, (count, first) in parts.items())
            raise JobError(f"{shown(path)} does not have all layers of the other model: {named}")


def _weights(layers: Iterable[LayerRef], model: Path) -> dict[str, _Weight]:
    files = [(component_of(file), map_checkpoint(file)) for file in model_files(model)]
    homes = {(component, name): tensors for component, tensors in files for name in tensors}
    return {
        layer.key: _Weight(layer, homes.get((layer.component, layer.parameter)) or homes[None, layer.parameter])
        for layer in layers
    }


def _pair(layer: LayerRef, base: _Weight, tuned: _Weight) -> LayerPair:
    one, other = (_plain(weight.layer.shape) for weight in (base, tuned))
    if one != other:
        raise ShapeMismatchError(f"layer {_name(layer)} is {one} in the base model and {other} in the tuned one")
    return LayerPair(_name(layer), layer, base, tuned)


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """A 1x1 convolution's is that of the Linear that does the same."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _name(layer: LayerRef) -> str:
    component, _, path = layer.key.partition(".")
    return layer_name(component, path)
