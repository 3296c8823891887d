"""A network in training: low-rank layers beside the frozen layers of a model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lib_lora.train.adapters import DyloraLayer, LoraLayer, Units
from lib_lora.train.groups import Rates, parameter_groups

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lib_lora.train.network_layers import TrainedModel
    from lib_lora.train.network_options import NetworkOptions


class Norms(NamedTuple):
    """What `TrainNetwork.scale_weight_norms` found and did.

    Attributes:
        scaled: Layers that were longer.
        mean: Frobenius norm of the layers' changes then.
        largest: The largest of them.
    """

    scaled: int
    mean: float
    largest: float


class TrainNetwork(nn.Module):
    """The layers that are trained. Parameters are float32 whatever the model's are; `state_dict` has kohya's keys.

    Attributes:
        bases: Name in the file → layer of the model.
        options: What it was made from.
        family: The model's.
        notes: Sentences for the user about what was tolerated.
    """

    def __init__(
        self,
        model: TrainedModel,
        layers: Mapping[str, LoraLayer],
        bases: Mapping[str, nn.Module],
        options: NetworkOptions,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.options = options
        self.family = model.family
        self.notes = tuple(notes)
        self.bases = dict(bases)
        self._roots = dict(model.components)
        self._layout = model.layout
        self._units = _shared_units(layers, options)
        self._handles: list[RemovableHandle] = []

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """Name in the file → layer; text encoders first."""
        return {name: layer for name, layer in self.named_children() if isinstance(layer, LoraLayer)}

    @property
    def components(self) -> tuple[str, ...]:
        """Those that have layers: ``te1``, ``te2``, ``unet``."""
        return tuple(dict.fromkeys(layer.component for layer in self.layers.values()))

    def attach(self) -> None:
        """Let the model compute with it: forward hooks on its layers; `release` takes them back."""
        self.release()
        for name, layer in self.layers.items():
            self._handles.append(self.bases[name].register_forward_hook(layer.add))
        for component, units in self._units.items():
            self._handles.append(self._roots[component].register_forward_pre_hook(units.draw))

    def release(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """Strength of the effect: a number, or one for each picture of the next batches, (N,)."""
        for layer in self.layers.values():
            layer.multiplier = multiplier

    @contextmanager
    def multiplied(self, multipliers: Tensor | None) -> Generator[None]:
        """Inside of it, forward and backward of a batch, each picture has its own strength, (N,); None for 1 of all."""
        if multipliers is None:
            yield
            return
        self.set_multiplier(multipliers)
        try:
            yield
        finally:
            self.set_multiplier(1.0)

    def groups(
        self, unet_lr: float | None, text_encoder_lr: float | None, default_lr: float | None
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer; see `parameter_groups`."""
        rates = Rates(unet_lr, text_encoder_lr, default_lr)
        return parameter_groups(self.layers.values(), rates, self.options, self._layout)

    @torch.no_grad()
    def scale_weight_norms(self, limit: float) -> Norms:
        """Shorten the changes that are longer than `limit` (Frobenius norm of scale · up @ down), both factors alike.

        Source: kohya's apply_max_norm_regularization.
        """
        layers = list(self.layers.values())
        norms = torch.stack([_norm(layer) for layer in layers])
        ratios = (limit / norms).clamp(max=1)  # infinity, of a change that is zero, is 1 too
        for layer, root in zip(layers, ratios.sqrt(), strict=True):
            layer.lora_up.weight.mul_(root)
            layer.lora_down.weight.mul_(root)
        after = norms * ratios
        scaled, mean, largest = torch.stack([(ratios != 1).sum(), after.mean(), after.max()]).tolist()
        return Norms(int(scaled), mean, largest)


def _shared_units(layers: Mapping[str, LoraLayer], options: NetworkOptions) -> dict[str, Units]:
    """What draws the unit of each component's layers; nothing without DyLoRA."""
    units: dict[str, Units] = {}
    for layer in layers.values():
        if isinstance(layer, DyloraLayer):
            layer.units = units.setdefault(layer.component, Units(layer.rank, options.unit))
    return units


def _norm(layer: LoraLayer) -> Tensor:
    """‖scale · up @ down‖ (Frobenius) from the small products: √ tr(upᵀup · down·downᵀ)."""
    up, down = layer.lora_up.weight.flatten(1), layer.lora_down.weight.flatten(1)
    square = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    return square.sqrt() * abs(layer.scale)
