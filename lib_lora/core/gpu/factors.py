"""Factors of LoRAs on the device: brought there once, in one transfer a file, and kept while there is room."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from lib_lora.core.adapters import LowRankAdapter

SHARE = 1 / 16
"""Of a GPU's memory, that factors may take between two switches."""
BUDGET = 1 << 30
"""The same on other devices, bytes."""
HALVES = (torch.float16, torch.bfloat16)


class Placed(NamedTuple):
    """One layer's factors: ΔW = scale · up.T @ down.

    Attributes:
        up: (rank, out): turned, so that those of many layers are joined row by row.
        down: (rank, in·kh·kw).
        scale: alpha / rank.
        rank: Of both.
    """

    up: Tensor
    down: Tensor
    scale: float
    rank: int

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.up, self.down))


class DeviceFactors:
    """Adapter → its factors on one device; an adapter that nobody has any more is forgotten."""

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        """Take no memory yet.

        Args:
            device: Where the factors go.
            budget: Bytes that are kept between switches; None for a share of the device's memory.
        """
        self._device = device
        self._budget = _share_of(device) if budget is None else budget
        self._placed: WeakKeyDictionary[LowRankAdapter, Placed] = WeakKeyDictionary()
        self._is_full = False

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(placed.nbytes for placed in self._placed.values())

    def bring(self, networks: Iterable[Sequence[LowRankAdapter]]) -> None:
        """Put on the device what is not there yet, the adapters of one network in one transfer a dtype."""
        for adapters in networks:
            kinds: dict[torch.dtype, list[LowRankAdapter]] = {}
            for adapter in adapters:
                if adapter not in self._placed:
                    kinds.setdefault(_kept_dtype(adapter), []).append(adapter)
            for dtype, new in kinds.items():
                self._send(new, dtype)
                self._is_full = self.nbytes > self._budget

    def __getitem__(self, adapter: LowRankAdapter) -> Placed:
        """What `bring` has put there."""
        return self._placed[adapter]

    def trim(self, used: Iterable[LowRankAdapter]) -> bool:
        """Keep to the budget: what was not used in this switch goes first, and then all.

        Returns:
            Whether there was room for everything.
        """
        if not self._is_full:
            return True
        self._placed = WeakKeyDictionary({adapter: self._placed[adapter] for adapter in used})
        if self.nbytes > self._budget:
            self._placed.clear()
        self._is_full = False
        return False

    def _send(self, adapters: Sequence[LowRankAdapter], dtype: torch.dtype) -> None:
        factors = [adapter.factors() for adapter in adapters]
        shapes = [(low.up.t().shape, low.down.shape) for low in factors]
        sizes = [shape.numel() for pair in shapes for shape in pair]
        packed = torch.empty(sum(sizes), dtype=dtype, pin_memory=self._device.type == "cuda")
        pieces = iter(packed.split_with_sizes(sizes))
        for low, (turned, straight) in zip(factors, shapes, strict=True):
            next(pieces).view(turned).copy_(low.up.t())
            next(pieces).view(straight).copy_(low.down)
        # torch's pinned memory is not used again before this transfer has ended
        there = iter(packed.to(self._device, non_blocking=True).split_with_sizes(sizes))
        for adapter, low, (turned, straight) in zip(adapters, factors, shapes, strict=True):
            up, down = next(there).view(turned), next(there).view(straight)
            self._placed[adapter] = Placed(up, down, low.scale, len(up))


def _kept_dtype(adapter: LowRankAdapter) -> torch.dtype:
    """The file's own where a device joins and multiplies it, else float32."""
    low = adapter.factors()
    return low.up.dtype if low.up.dtype == low.down.dtype and low.up.dtype in HALVES else torch.float32


def _share_of(device: torch.device) -> int:
    if device.type != "cuda":
        return BUDGET
    return int(SHARE * torch.cuda.mem_get_info(device)[1])
