"""Many low-rank layers at once: a few launches for all factors, then for each weight a copy of the base and a product.

cuBLAS adds to the matrix that it writes, and torch's `addmm` with another one copies that first. So the base is copied
into the live weight by a kernel that takes dozens of weights, or by transfers from the host that run ahead, and the
product is added there, in place: base and product are summed in float32 and rounded once, as by `numerics.fuse_layer`.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast
from weakref import ref as weakref

import torch

from lib_lora.core.adapters.base import exact_products
from lib_lora.core.base_store import copy_all
from lib_lora.core.gpu.factors import DeviceFactors
from lib_lora.core.gpu.lanes import InOrder, second_stream
from lib_lora.core.gpu.stacks import Stacker
from lib_lora.core.numerics import has_native_gemm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from lib_lora.core.adapters import LowRankAdapter
    from lib_lora.core.gpu.graphs import SwitchGraphs
    from lib_lora.core.gpu.lanes import Copies, Lane
    from lib_lora.core.gpu.stacks import Join, Product
    from lib_lora.core.plan import LayerPatch

    Step = tuple[Sequence["Sum"], Copies]

T = TypeVar("T")

CHUNK_BYTES = 16 << 20
"""Weights that are copied by one call and awaited by one event: they are still in a large cache for their products."""
STACK_BYTES = 256 << 20
"""Factors that are joined at a time."""
MOST_RECIPES = 2
"""Of sets of LoRAs that come again, such as two that are compared."""


class Sum(NamedTuple):
    """One layer: out = round(base + Σ factor · ΔW).

    Attributes:
        out: The live weight, for which `can_group` holds.
        base: The untouched weight of the same shape, on any device.
        patch: What is added; all its terms are low-rank.
    """

    out: Tensor
    base: Tensor
    patch: LayerPatch

    @property
    def weight_bytes(self) -> int:
        """Of `out`."""
        return self.out.numel() * self.out.element_size()

    @property
    def factor_bytes(self) -> int:
        """Of its joined factors."""
        height = self.out.shape[0]
        rank = sum(term.adapter.rank for term in self.patch.terms)
        return rank * (height + self.out.numel() // height) * self.out.element_size()


class Batch(NamedTuple):
    """Layers whose factors are joined together.

    Attributes:
        chunks: Places of the layers in the switch; the bases of one chunk are copied together.
        joins: What is done first.
        products: What is added to each layer, chunk by chunk.
    """

    chunks: list[list[int]]
    joins: list[Join]
    products: list[Product]


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a switch is done that may come again.

    Attributes:
        made_for: The patch and dtype of each layer; a patch that is gone is no other.
        batches: All layers.
    """

    made_for: list[tuple[weakref[LayerPatch], torch.dtype]]
    batches: list[Batch]

    def fits(self, sums: Sequence[Sum]) -> bool:
        """Whether these are the layers."""
        pairs = zip(self.made_for, sums, strict=False)
        same = len(sums) == len(self.made_for)
        return same and all(made() is entry.patch and dtype == entry.out.dtype for (made, dtype), entry in pairs)


def can_group(out: Tensor) -> bool:
    """Whether products can be added to a weight in place, in a dtype in which they are summed exactly."""
    return out.ndim > 1 and out.is_contiguous() and has_native_gemm(out.dtype, out.device.type)


class GroupedKernel:
    """Writes many sums on one device; keeps factors, scratch memory and graphs there from switch to switch."""

    def __init__(self, device: torch.device, graphs: SwitchGraphs | None = None) -> None:
        """Take no memory yet.

        Args:
            device: Where the weights are.
            graphs: Records what is the same in every switch, and replays it; None to launch it each time.
        """
        self._device = device
        self._graphs = graphs
        self._factors = DeviceFactors(device)
        self._stacker = Stacker(device, steady=graphs is not None)
        self._recipes: deque[Recipe] = deque(maxlen=MOST_RECIPES)

    def write(self, sums: Sequence[Sum], *, near: bool) -> None:
        """Compute all of them; nothing waits for the device.

        Args:
            sums: On this device.
            near: Whether the bases lie in its memory.

        Raises:
            RuntimeError: torch's own, among them OutOfMemoryError.
        """
        recipe = next((known for known in self._recipes if known.fits(sums)), None) or self._new_recipe(sums)
        chunks = [[sums[at] for at in chunk] for batch in recipe.batches for chunk in batch.chunks]
        with exact_products(self._device), self._lane(near) as lane:
            steps = iter([(chunk, lane.submit(partial(_copy_bases, chunk))) for chunk in chunks])
            for batch in recipe.batches:
                for join in batch.joins:
                    join.do()
                self._add([*islice(steps, len(batch.chunks))], batch.products, near)

    def _add(self, steps: Sequence[Step], products: Sequence[Product], near: bool) -> None:
        work = partial(_add_products, steps, products)
        if self._graphs is None or not near:
            work()
        else:
            self._graphs.run(_places([entry for chunk, _ in steps for entry in chunk], products), work)

    def _new_recipe(self, sums: Sequence[Sum]) -> Recipe:
        """Bring the factors, and plan what is done with them; kept as long as there is room for the factors."""
        networks = _by_network(sums)
        self._factors.bring(networks)
        batches = [
            self._batch(sums, chunks)
            for dtype in dict.fromkeys(entry.out.dtype for entry in sums)
            for chunks in _batches(sums, [at for at, entry in enumerate(sums) if entry.out.dtype == dtype])
        ]
        recipe = Recipe([(weakref(entry.patch), entry.out.dtype) for entry in sums], batches)
        if self._factors.trim(adapter for adapters in networks for adapter in adapters):
            self._recipes.append(recipe)
        else:
            self._recipes.clear()  # they hold factors
        return recipe

    def _batch(self, sums: Sequence[Sum], chunks: list[list[int]]) -> Batch:
        own = [sums[at] for chunk in chunks for at in chunk]
        factors = [[self._factors[adapter] for adapter in _adapters(entry)] for entry in own]
        strengths = [[term.factor for term in entry.patch.terms] for entry in own]
        return Batch(chunks, *self._stacker.products(factors, strengths, own[0].out.dtype))

    def _lane(self, near: bool) -> AbstractContextManager[Lane]:
        if near or self._device.type != "cuda":
            return nullcontext(InOrder())
        return second_stream(self._stream, self._device)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)


def _copy_bases(chunk: Sequence[Sum]) -> None:
    copy_all([entry.out for entry in chunk], [entry.base for entry in chunk])


def _add_products(steps: Sequence[Step], products: Sequence[Product]) -> None:
    following = iter(products)
    for chunk, await_bases in steps:
        await_bases()
        for entry in chunk:
            up, down, gain = next(following)
            entry.out.flatten(1).addmm_(up, down, alpha=gain)


def _places(sums: Sequence[Sum], products: Sequence[Product]) -> tuple[object, ...]:
    """All that is fixed in a recording: what is read and written, where, and the gains."""
    weights = ((out.shape, out.dtype, out.data_ptr(), base.dtype, base.data_ptr()) for out, base, _ in sums)
    added = ((up.shape[1], up.data_ptr(), down.data_ptr(), gain) for up, down, gain in products)
    return tuple(zip(weights, added, strict=True))


def _adapters(entry: Sum) -> list[LowRankAdapter]:
    return [cast("LowRankAdapter", term.adapter) for term in entry.patch.terms]


def _by_network(sums: Sequence[Sum]) -> list[list[LowRankAdapter]]:
    networks: dict[str, list[LowRankAdapter]] = {}
    for entry in sums:
        for adapter, network in zip(_adapters(entry), entry.patch.networks, strict=True):
            networks.setdefault(network.uid, []).append(adapter)
    return list(networks.values())


def _batches(sums: Sequence[Sum], places: Sequence[int]) -> list[list[list[int]]]:
    """Batches of chunks of these places."""
    chunks = _cut(places, [sums[at].weight_bytes for at in places], CHUNK_BYTES)
    return _cut(chunks, [sum(sums[at].factor_bytes for at in chunk) for chunk in chunks], STACK_BYTES)


def _cut(items: Sequence[T], sizes: Sequence[int], limit: int) -> list[list[T]]:
    """Runs of items whose sizes do not exceed the limit together; a larger one is alone."""
    runs: list[list[T]] = []
    filled = limit
    for item, size in zip(items, sizes, strict=True):
        if filled + size > limit:
            runs.append([])
            filled = 0
        runs[-1].append(item)
        filled += size
    return runs
