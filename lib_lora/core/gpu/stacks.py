"""The factors of many layers, joined into one matrix a layer by a few calls."""

from __future__ import annotations

import math
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from lib_lora.core.numerics import common_gain
from lib_lora.core.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lib_lora.core.gpu.factors import Placed

ALIGNMENT = 64
"""Numbers; cuBLAS has faster kernels for matrices that begin at multiples of 16 bytes."""
STEADY_RANK = 16
"""Steady stacks are filled up with zeros to multiples of this rank."""
STEADY_GAIN = 2.0**8
"""The gains of steady stacks are powers of this."""


class Product(NamedTuple):
    """What is added to a weight: gain · up @ down, (out, Σ rank) and (Σ rank, in·kh·kw)."""

    up: Tensor
    down: Tensor
    gain: float


class Join(NamedTuple):
    """Matrices of one width that become one, below each other.

    Attributes:
        pieces: (rank, width) each.
        out: (Σ rank, width).
        scale: What each row is multiplied by, (Σ rank, 1) float32; None for 1.
    """

    pieces: list[Tensor]
    out: Tensor
    scale: Tensor | None

    def do(self) -> None:
        """Concatenate, and multiply in float32; rounded once to the dtype of `out`."""
        dtype = reduce(torch.promote_types, {piece.dtype for piece in self.pieces})
        joined = torch.cat(self.pieces, out=self.out if dtype == self.out.dtype else None)
        if self.scale is not None:
            torch.mul(joined, self.scale, out=self.out)
        elif joined is not self.out:
            self.out.copy_(joined)


class Stacker:
    """Plans joins of factors into memory of its own, which those of another call use too."""

    def __init__(self, device: torch.device, *, steady: bool) -> None:
        """Take no memory yet.

        Args:
            device: Where the factors are.
            steady: Whether ranks and gains are made alike, so that most other LoRAs and strengths have the same. It
                costs no bits but those of numbers that are subnormal in fp16.
        """
        self._device = device
        self._steady = steady
        self._workspace = Workspace()
        self._zeros: dict[tuple[int, torch.dtype], Tensor] = {}

    def products(
        self, layers: Sequence[Sequence[Placed]], strengths: Sequence[Sequence[float]], dtype: torch.dtype
    ) -> tuple[list[Join], list[Product]]:
        """Each layer's terms as one product, and the joins to be done before.

        Args:
            layers: The factors of each term.
            strengths: What each term is multiplied by; folded into `up` in float32, as by `numerics.stack`.
            dtype: Of the result.
        """
        scales = [
            [low.scale * strength for low, strength in zip(terms, own, strict=True)]
            for terms, own in zip(layers, strengths, strict=True)
        ]
        gains = [self._gain(own, dtype) for own in scales]
        folded = [[scale / gain for scale in own] for own, gain in zip(scales, gains, strict=True)]
        ranks = [[low.rank for low in terms] for terms in layers]
        up_joins, ups = self._joined("up", [[low.up for low in terms] for terms in layers], ranks, dtype, folded)
        down_joins, downs = self._joined("down", [[low.down for low in terms] for terms in layers], ranks, dtype)
        products = [Product(up.t(), down, gain) for up, down, gain in zip(ups, downs, gains, strict=True)]
        return [*up_joins, *down_joins], products

    def _gain(self, scales: Sequence[float], dtype: torch.dtype) -> float:
        """The number that all terms have in common, or what keeps the largest near 1."""
        if self._steady:
            return STEADY_GAIN ** round(math.log(common_gain(scales, dtype), STEADY_GAIN))
        alike = scales.count(scales[0]) == len(scales)
        return (scales[0] or 1.0) if alike else common_gain(scales, dtype)

    def _joined(
        self,
        name: str,
        layers: Sequence[Sequence[Tensor]],
        ranks: Sequence[Sequence[int]],
        dtype: torch.dtype,
        scales: Sequence[Sequence[float]] | None = None,
    ) -> tuple[list[Join], list[Tensor]]:
        """Each layer's matrices one below the other, (Σ rank, width); all layers of one width by one join.

        Args:
            name: Of the memory.
            layers: (rank, width) of each term.
            ranks: Of each term.
            dtype: Of the result.
            scales: What each is multiplied by; None for 1.
        """
        widths = [own[0].shape[1] for own in layers]
        order = sorted(range(len(layers)), key=widths.__getitem__)
        gaps = [-sum(own) % STEADY_RANK if self._steady else 0 for own in ranks]
        rows = [sum(own) + gap for own, gap in zip(ranks, gaps, strict=True)]
        each = None if scales is None else self._of_rows([(scales[at], ranks[at], gaps[at]) for at in order])
        total = sum(height * width for height, width in zip(rows, widths, strict=True))
        memory = self._workspace.take(name, (1, total + ALIGNMENT * len(layers)), dtype, self._device)[0]
        joins: list[Join] = []
        result: dict[int, Tensor] = {}
        start = first = 0
        for width, group in groupby(order, widths.__getitem__):
            members = list(group)
            height = sum(rows[at] for at in members)
            joined = memory[start : start + height * width].view(height, width)
            pieces = [piece for at in members for piece in (*layers[at], *self._padding(layers[at][0], gaps[at]))]
            joins.append(Join(pieces, joined, None if each is None else each[first : first + height]))
            result.update(zip(members, joined.split_with_sizes([rows[at] for at in members]), strict=True))
            start, first = start + -(-height * width // ALIGNMENT) * ALIGNMENT, first + height
        return joins, [result[at] for at in range(len(layers))]

    def _padding(self, like: Tensor, rows: int) -> Sequence[Tensor]:
        """Rows of zeros, if any are wanted."""
        if not rows:
            return ()
        key = like.shape[1], like.dtype
        if key not in self._zeros:
            self._zeros[key] = like.new_zeros((STEADY_RANK, like.shape[1]))
        return (self._zeros[key][:rows],)

    def _of_rows(self, layers: Sequence[tuple[Sequence[float], Sequence[int], int]]) -> Tensor | None:
        """The scale of each row, (Σ Σ rank, 1) float32, in one transfer; None if all are 1.

        Args:
            layers: The scale of each term, its rank, and how many rows of zeros follow.
        """
        if all(scale == 1.0 for scales, _, _ in layers for scale in scales):
            return None
        flat = torch.tensor([scale for scales, _, _ in layers for scale in (*scales, 0.0)], dtype=torch.float32)
        counts = torch.tensor([count for _, ranks, gap in layers for count in (*ranks, gap)])
        rows = flat.repeat_interleave(counts).unsqueeze(1)
        return rows.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else rows
