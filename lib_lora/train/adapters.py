"""What is trained beside one frozen layer: scale · up(down(x)), with scale = alpha / rank.

Sources: Hu et al. 2021 (arXiv 2106.09685); Valipour et al. 2022 (DyLoRA, arXiv 2210.07558); kohya's networks/lora.py
for the order of the dropouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from lib_lora.core.adapters.lora import LoraAdapter


@dataclass(frozen=True)
class Dropouts:
    """Shares of what is left out in training, 0 to below 1.

    Attributes:
        neuron: Of the values between the factors.
        rank: Of the ranks, for each picture; the others are scaled up by 1 / (1 - share).
        module: Of the forwards of a layer.
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0


class LoraLayer(nn.Module):
    """The change of one Linear or Conv2d; `add` is a forward hook of it.

    All that is left to chance is drawn from torch's generators, which gradient checkpointing rewinds: the second
    forward of a block leaves out what the first did.

    Attributes:
        lora_down: (rank, in) or (rank, in, kh, kw), with the layer's own stride and padding.
        lora_up: (out, rank) or (out, rank, 1, 1), zeros at first.
        alpha: () float32.
        component: ``unet``, ``te1`` or ``te2``.
        block: Index of the UNet's block (`BlockLayout.index`).
        multiplier: Strength; one number, or one for each picture, (N,).
    """

    alpha: Tensor

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float,
        dropouts: Dropouts | None = None,
        *,
        component: str = "unet",
        block: int = -1,
    ) -> None:
        super().__init__()
        self.component = component
        self.block = block
        self.multiplier: float | Tensor = 1.0
        self.dropouts = dropouts or Dropouts()
        self.rank = rank
        self.scale = (alpha or rank) / rank
        self.lora_down, self.lora_up = _factors(base, rank)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha or rank)))

    def add(self, base: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The output of `base`, and the change times its input and the strength added."""
        share, strength = self.dropouts.module, self.multiplier
        if not isinstance(strength, torch.Tensor) and strength == 0:
            return output
        if share and self.training and torch.rand(1).item() < share:
            return output
        hidden, up = self._hidden(args[0], strength)
        return _added(self.lora_up, output, hidden.to(output.dtype), up)

    def forward(self, x: Tensor) -> Tensor:
        """The change at strength 1: (N, …, in) → (N, …, out), or (N, in, h, w) → (N, out, h', w')."""
        return _product(self.lora_up, *self._hidden(x, 1.0))

    def _hidden(self, x: Tensor, strength: float | Tensor) -> tuple[Tensor, Tensor]:
        """What comes between the factors, where the numbers are fewest: scaled; and up."""
        down, up, scale = self.factors()
        hidden = _product(self.lora_down, x, down)
        if self.training and self.dropouts.neuron:
            hidden = functional.dropout(hidden, self.dropouts.neuron)
        if self.training and self.dropouts.rank:
            hidden = hidden * _kept_ranks(hidden, self.dropouts.rank, self.lora_down)
            scale /= 1 - self.dropouts.rank
        if isinstance(strength, torch.Tensor):
            strength = strength.repeat_interleave(len(hidden) // len(strength))  # a long caption has several pieces
            strength = strength.to(hidden.device, hidden.dtype).reshape(-1, *(1,) * (hidden.ndim - 1))
        return hidden * (strength * scale), up

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """down, up and scale of a forward."""
        return self.lora_down.weight, self.lora_up.weight, self.scale

    @torch.no_grad()
    def load(self, adapter: LoraAdapter) -> None:
        """Have the effect of a file's layer of the same shape and rank; the alpha stays, `up` makes up for it."""
        self.lora_down.weight.copy_(adapter.down.reshape_as(self.lora_down.weight))
        self.lora_up.weight.copy_(adapter.up.reshape_as(self.lora_up.weight))
        if adapter.scale != self.scale:
            self.lora_up.weight.mul_(adapter.scale / self.scale)


class Units:
    """Which unit of ranks DyLoRA trains in this forward of a component.

    It is the same in all of its layers, for a file is cut in all layers alike.

    Attributes:
        rank: Of the whole.
        unit: Ranks that are trained together.
        start: The first rank of the unit.
    """

    def __init__(self, rank: int, unit: int) -> None:
        self.rank = rank
        self.unit = unit
        self.start = rank - unit

    def draw(self, *_: object) -> None:
        """Choose one; a pre-forward hook of the component."""
        self.start = self.unit * int(torch.randint(self.rank // self.unit, ()).item())


class DyloraLayer(LoraLayer):
    """LoRA whose first ranks are a LoRA of their own: each forward trains one unit of ranks and uses those up to it.

    Ranks before the unit are used as they are, ranks behind it not at all, all at the scale alpha / rank of the whole.
    So a unit learns what those before it leave over, and the first ranks of the file have, with ``dyn=`` or cut by
    `split_dylora`, the effect they were trained to have. kohya's script differs: it uses all ranks in each forward, at
    the scale alpha / rank · √(rank / ranks up to the unit), draws a unit for each layer, and cuts leave alpha as it is.
    Outside of training all ranks are used.

    A forward of a component and its backward belong together: under gradient checkpointing no other forward may come
    between them. Gradients of ranks that are not trained are 0, so an optimizer's momentum still moves them.
    """

    units: Units

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """down, up and scale of a forward."""
        down, up, scale = super().factors()
        if not self.training:
            return down, up, scale
        start, stop = self.units.start, self.units.start + self.units.unit
        down = torch.cat([down[:start].detach(), down[start:stop]])
        up = torch.cat([up[:, :start].detach(), up[:, start:stop]], 1)
        return down, up, scale


def _factors(base: nn.Linear | nn.Conv2d, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """down, drawn by Kaiming's rule with a = √5, which is what these classes do, and up; float32 on the CPU."""
    if isinstance(base, nn.Linear):
        return nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
    down = nn.Conv2d(
        base.in_channels,
        rank,
        cast("tuple[int, int]", base.kernel_size),
        cast("tuple[int, int]", base.stride),
        cast("tuple[int, int]", base.padding),
        cast("tuple[int, int]", base.dilation),
        bias=False,
        padding_mode=base.padding_mode,
    )
    return down, nn.Conv2d(rank, base.out_channels, 1, bias=False)


def _product(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """What `layer` computes with another weight, in the type of `x`; autocast may choose another."""
    weight = weight.to(x.dtype)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight)
    return layer._conv_forward(x, weight, None)  # pyright: ignore[reportPrivateUsage] -- knows every padding mode


def _added(layer: nn.Linear | nn.Conv2d, output: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """The output, and up of hidden added by the product's own kernel; `layer` is that of `up`."""
    up = up.to(hidden.dtype)
    if isinstance(layer, nn.Linear):
        flat = torch.addmm(output.reshape(-1, output.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), up.t())
    else:
        flat = torch.baddbmm(output.flatten(2), up.flatten(1).expand(len(hidden), -1, -1), hidden.flatten(2))
    return flat.reshape(output.shape)


def _kept_ranks(hidden: Tensor, share: float, layer: nn.Module) -> Tensor:
    """1 for each rank of each picture that is kept, else 0; with as many dimensions as `hidden`."""
    ranks = hidden.shape[-1] if isinstance(layer, nn.Linear) else hidden.shape[1]
    kept = torch.rand((len(hidden), ranks), device=hidden.device) > share
    between = (1,) * (hidden.ndim - 2)
    shape = (*between, ranks) if isinstance(layer, nn.Linear) else (ranks, *between)
    return kept.reshape(len(hidden), *shape)
