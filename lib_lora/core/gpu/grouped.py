"""Many low-rank layers at once: a few launches for all factors, then for each weight a copy of the base and a product.

cuBLAS adds to the matrix that it writes, and torch's `addmm` with another one copies that first. So the base is copied
into the live weight by a kernel that takes dozens of weights, or by transfers from the host that run ahead, and the
product is added there, in place: base and product are summed in float32 and rounded once, as by `numerics.fuse_layer`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import torch

from lib_lora.core.adapters import is_low_rank
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
    from lib_lora.core.gpu.stacks import Product
    from lib_lora.core.network import Network
    from lib_lora.core.numerics import Term

T = TypeVar("T")

CHUNK_BYTES = 16 << 20
"""Weights that are copied by one call and awaited by one event: they are still in a large cache for their products."""
STACK_BYTES = 256 << 20
"""Factors that are joined at a time."""


class Sum(NamedTuple):
    """One layer: out = round(base + Σ factor · ΔW).

    Attributes:
        out: The live weight, for which `can_group` holds.
        base: The untouched weight of the same shape, on any device.
        terms: Its summands.
        networks: The network of each.
    """

    out: Tensor
    base: Tensor
    terms: Sequence[Term]
    networks: Sequence[Network]

    @property
    def adapters(self) -> list[LowRankAdapter]:
        """Of its terms."""
        return [cast("LowRankAdapter", term.adapter) for term in self.terms]

    @property
    def weight_bytes(self) -> int:
        """Of `out`."""
        return self.out.numel() * self.out.element_size()

    @property
    def factor_bytes(self) -> int:
        """Of its joined factors."""
        height = self.out.shape[0]
        rank = sum(term.adapter.rank for term in self.terms)
        return rank * (height + self.out.numel() // height) * self.out.element_size()


def can_group(out: Tensor, terms: Sequence[Term]) -> bool:
    """Whether a layer can be written with others: plain low-rank sums, in a dtype whose products are summed exactly."""
    plain = out.ndim > 1 and out.is_contiguous() and has_native_gemm(out.dtype, out.device.type)
    return plain and bool(terms) and all(is_low_rank(term.adapter) for term in terms)


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

    def write(self, sums: Sequence[Sum], *, near: bool) -> None:
        """Compute all of them; nothing waits for the device.

        Args:
            sums: On this device.
            near: Whether the bases lie in its memory.

        Raises:
            RuntimeError: torch's own, among them OutOfMemoryError.
        """
        used = _by_network(sums)
        self._factors.bring(used)
        with exact_products(self._device):
            for dtype in dict.fromkeys(entry.out.dtype for entry in sums):
                self._write([entry for entry in sums if entry.out.dtype == dtype], near)
        self._factors.trim(adapter for adapters in used for adapter in adapters)

    def _write(self, sums: Sequence[Sum], near: bool) -> None:
        chunks = _cut(sums, [entry.weight_bytes for entry in sums], CHUNK_BYTES)
        with self._lane(near) as lane:
            steps = [(chunk, lane.submit(partial(_copy_bases, chunk))) for chunk in chunks]
            loads = [sum(entry.factor_bytes for entry in chunk) for chunk in chunks]
            for batch in _cut(steps, loads, STACK_BYTES):
                self._add(batch, near)

    def _add(self, steps: Sequence[tuple[Sequence[Sum], Copies]], near: bool) -> None:
        """Await bases, and add the products of their layers."""
        sums = [entry for chunk, _ in steps for entry in chunk]
        factors = [[self._factors[adapter] for adapter in entry.adapters] for entry in sums]
        strengths = [[term.factor for term in entry.terms] for entry in sums]
        products = self._stacker.products(factors, strengths, sums[0].out.dtype)
        work = partial(_add_products, steps, products)
        if self._graphs is None or not near:
            work()
        else:
            self._graphs.run(_places(sums, products), work)

    def _lane(self, near: bool) -> AbstractContextManager[Lane]:
        if near or self._device.type != "cuda":
            return nullcontext(InOrder())
        return second_stream(self._stream, self._device)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)


def _copy_bases(chunk: Sequence[Sum]) -> None:
    copy_all([entry.out for entry in chunk], [entry.base for entry in chunk])


def _add_products(steps: Sequence[tuple[Sequence[Sum], Copies]], products: Sequence[Product]) -> None:
    following = iter(products)
    for chunk, await_bases in steps:
        await_bases()
        for entry in chunk:
            up, down, gain = next(following)
            entry.out.flatten(1).addmm_(up, down, alpha=gain)


def _places(sums: Sequence[Sum], products: Sequence[Product]) -> tuple[object, ...]:
    """All that is fixed in a recording: what is read and written, where, and the gains."""
    weights = ((out.shape, out.dtype, out.data_ptr(), base.dtype, base.data_ptr()) for out, base, *_ in sums)
    added = ((up.shape[1], up.data_ptr(), down.data_ptr(), gain) for up, down, gain in products)
    return tuple(zip(weights, added, strict=True))


def _by_network(sums: Sequence[Sum]) -> list[list[LowRankAdapter]]:
    networks: dict[str, list[LowRankAdapter]] = {}
    for entry in sums:
        for adapter, network in zip(entry.adapters, entry.networks, strict=True):
            networks.setdefault(network.uid, []).append(adapter)
    return list(networks.values())


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
