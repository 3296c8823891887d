"""Rows of an adapter that was made for a fused weight, for a model that has its parts as layers of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lib_lora.core.adapters.dora import DoraAdapter
from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.core.adapters.wrapped import WrappedAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lib_lora.core.adapters.base import WeightAdapter
    from lib_lora.core.workspace import Workspace

    Rows = Sequence[tuple[int, int]]


def rows_of(adapter: WeightAdapter, rows: Rows, layer_shape: tuple[int, ...]) -> WeightAdapter | None:
    """An adapter whose ΔW is these rows of the given one's, in this order.

    Args:
        adapter: Of the fused weight.
        rows: First and last + 1 row of each piece.
        layer_shape: Shape of all pieces together.

    Returns:
        None if ΔW depends on more of the fused weight than these rows, or is computed in blocks that lie across them.
    """
    if isinstance(adapter, LoraAdapter):
        return adapter.of_rows(rows)
    if isinstance(adapter, DoraAdapter) and adapter.per_output:
        inner = rows_of(adapter.inner, rows, layer_shape)
        magnitude = adapter.magnitude.flatten()
        parts = [magnitude[start:stop] for start, stop in rows]
        return inner and replace(adapter, inner=inner, magnitude=torch.cat(parts))
    step = adapter.row_step
    if adapter.needs_base or not step or any(start % step or stop % step for start, stop in rows):
        return None
    return RowsAdapter(adapter, layer_shape, rows)


@dataclass(frozen=True, eq=False)
class RowsAdapter(WrappedAdapter):
    """Rows of a dense ΔW that does not depend on the weight.

    Attributes:
        rows: First and last + 1 row of each piece of the fused weight, multiples of the inner `row_step`.
    """

    rows: Rows

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · ΔW[rows], piece by piece."""
        # the adapter inside reads the shape and the device only
        whole = base.new_empty(()).expand(self.inner.shape[0], *base.shape[1:])
        first = 0
        for start, stop in self.rows:
            low, high = max(rows.start, first), min(rows.stop, first + stop - start)
            if low < high:
                inside = slice(start + low - first, start + high - first)
                self.inner.add_to(total[low - rows.start : high - rows.start], whole, inside, factor, workspace)
            first += stop - start
