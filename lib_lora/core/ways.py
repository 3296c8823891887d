"""How a strength that moves while a picture is made is brought into the model, chosen by what each way costs.

- ``exact``: all LoRAs of a layer are fused anew at each move. One rounding, no memory.
- ``held``: the sum of those that stay is rounded and kept; at a move the one that moves is added to it, at the cost of
  its own rank. Two roundings, and one more copy of the weights it acts on. On a CPU, where memory allows one more, its
  product is rounded and kept too, and a move costs what reading both does.
- ``hooked``: the one that moves is no part of the weights; forwards add it, which each step pays where it acts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from lib_lora.core.numerics import has_native_gemm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Way = Literal["exact", "held", "hooked"]

FEW_MOVES = 2
"""On and off (``start= stop= step=``): up to here pictures are those of a switch by hand, bit for bit."""
POSITIONS = 1650
"""How often a layer's factors are applied in a step: tokens or pixels x batch, the mean over in + out of the layers.

Counted from the shapes of SD1.5's transformers: 512 x 512 pixels, guidance (batch 2).
"""
ADVANTAGE = 0.75
"""Of the cost of the exact way, that another one may have at most: the exact one rounds once and takes no memory."""


@dataclass(frozen=True)
class Ways:
    """Which parts of a plan are not fused in one sum.

    Attributes:
        held: Layer key → `Network.uid` of those that are added to the held sum of the others.
        hooked: Layer key → `Network.uid` of those that are added to its forward.
    """

    held: Mapping[str, frozenset[str]] = field(default_factory=dict[str, "frozenset[str]"])
    hooked: Mapping[str, frozenset[str]] = field(default_factory=dict[str, "frozenset[str]"])

    def way(self, uid: str) -> Way:
        """Of one network."""
        if any(uid in uids for uids in self.held.values()):
            return "held"
        return "hooked" if any(uid in uids for uids in self.hooked.values()) else "exact"


EXACT = Ways()


class Rates(NamedTuple):
    """What a device does in a second, and what a layer costs whatever its size.

    Attributes:
        gemm: Multiplications and additions, each counted.
        bandwidth: Bytes that are read or written.
        fresh: Bytes of new memory that are written for the first time.
        layer: Seconds to fuse or hook one.
        hook: Seconds that one hook adds to a step.
    """

    gemm: float
    bandwidth: float
    fresh: float
    layer: float
    hook: float


CPU = Rates(gemm=170e9, bandwidth=36e9, fresh=2.5e9, layer=60e-6, hook=60e-6)
"""Two cores of an AMD EPYC, from benchmarks/results/switch-lierla-cpu-fp32.md: 1068 MB in 192 layers are copied in
58 ms; a sum of rank 160 takes 567 ms, one of rank 32 165 ms. New memory: 256 MB took 0.1 s more than used memory."""
CPU_HALF = Rates(gemm=450e9, bandwidth=36e9, fresh=2.5e9, layer=60e-6, hook=60e-6)
"""The same with bf16 in hardware: 534 MB in 28 ms, rank 160 in 219 ms (switch-lierla-cpu-bf16.md)."""
GPU = Rates(gemm=50e12, bandwidth=600e9, fresh=600e9, layer=80e-6, hook=25e-6)
"""Not measured: data sheets of the smaller cards (NVIDIA A10), and about 5 µs for each call that starts a kernel. Most
is what a layer costs whatever its size, so copies are seldom worth their memory."""


class Load(NamedTuple):
    """A layer that the moving network acts on.

    Attributes:
        elements: Of its weight.
        itemsize: Bytes of each.
        edge: Rows + columns of the weight as a matrix.
        rank: Of the moving network.
        others: Σ rank of the networks that stay.
        can_hold: Whether their sum can be held (see `moving.holdable`).
        can_keep: Whether the product of the moving network, the only one that moves, can be kept too (see
            `held.takes_products`).
    """

    elements: int
    itemsize: int
    edge: int
    rank: int
    others: int
    can_hold: bool = True
    can_keep: bool = False

    @property
    def is_held(self) -> bool:
        """Whether there is a sum to hold, and it can be."""
        return self.can_hold and self.others > 0

    @property
    def nbytes(self) -> int:
        """Memory of its weight."""
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Movement:
    """What the rest of a pass asks of one network.

    Attributes:
        moves: Steps at which its strength changes.
        active: Steps at which it is not 0.
        is_fused: Whether it is in the weights as yet.
        loads: Where it acts.
        can_hook: Whether all of these layers can be hooked.
        free_bytes: Memory for copies of weights, or None if that is not known.
    """

    moves: int
    active: int
    is_fused: bool
    loads: Sequence[Load]
    can_hook: bool = False
    free_bytes: int | None = None


def rates_of(device_type: str, dtype: torch.dtype) -> Rates:
    """Rates of a device of this type, for weights of this dtype."""
    if device_type != "cpu":
        return GPU
    return CPU_HALF if dtype != torch.float32 and has_native_gemm(dtype, device_type) else CPU


def choose(movement: Movement, rates: Rates) -> Way:
    """The cheapest way that is possible; the exact one where that is not much dearer, or strengths move seldom."""
    if movement.moves <= FEW_MOVES:
        return "exact"
    costs: dict[Way, float] = {"exact": ADVANTAGE * exact_cost(movement, rates)}
    if any(load.is_held for load in movement.loads) and _fits(movement):
        costs["held"] = held_cost(movement, rates)
    if movement.can_hook:
        costs["hooked"] = hooked_cost(movement, rates)
    return min(costs, key=lambda way: costs[way])


def exact_cost(movement: Movement, rates: Rates) -> float:
    """Seconds to fuse everything at each move."""
    return movement.moves * sum(_fusing(load, load.others + load.rank, rates) for load in movement.loads)


def held_cost(movement: Movement, rates: Rates) -> float:
    """Seconds to compute the held sums once, or copy them where the weights are that, and to add to them."""
    keeps = keeps_products(movement)
    moving = sum(_adding(load, rates, keeps=keeps) for load in movement.loads)
    held = [load for load in movement.loads if load.is_held]
    sums = sum(_fusing(load, load.others * movement.is_fused, rates) for load in held)
    products = sum(_fusing(load, load.rank, rates) for load in held) if keeps else 0.0
    return movement.moves * moving + sums + products + held_bytes(movement) * (1 + keeps) / rates.fresh


def hooked_cost(movement: Movement, rates: Rates) -> float:
    """Seconds to take the network out of the weights, to hook it at each move, and to compute it in each step."""
    out = sum(_fusing(load, load.others, rates) for load in movement.loads) if movement.is_fused else 0.0
    step = sum(
        rates.hook + 2 * POSITIONS * min(load.rank * load.edge, load.elements) / rates.gemm for load in movement.loads
    )
    return out + movement.moves * rates.layer * len(movement.loads) + movement.active * step


def held_bytes(movement: Movement) -> int:
    """Memory of the sums that would be held."""
    return sum(load.nbytes for load in movement.loads if load.is_held)


def keeps_products(movement: Movement) -> bool:
    """Whether there is memory for the products beside the sums, and all of them can be kept."""
    return _fits(movement, copies=2) and all(load.can_keep for load in movement.loads if load.is_held)


def _fits(movement: Movement, copies: int = 1) -> bool:
    return movement.free_bytes is None or copies * held_bytes(movement) <= movement.free_bytes


def _fusing(load: Load, rank: int, rates: Rates) -> float:
    """Seconds to read a weight, add an update of this rank, and write it."""
    return rates.layer + 2 * load.nbytes / rates.bandwidth + 2 * load.elements * rank / rates.gemm


def _adding(load: Load, rates: Rates, *, keeps: bool) -> float:
    """Seconds of one move: read sum and product, and write the weight; or multiply; or, without a sum, fuse anew."""
    if load.is_held and keeps:
        return rates.layer + 3 * load.nbytes / rates.bandwidth
    return _fusing(load, load.rank if load.is_held else load.others + load.rank, rates)
