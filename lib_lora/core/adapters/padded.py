"""An adapter for a layer with more input channels than it knows: it changes the first ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.core.adapters.base import DenseAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lib_lora.core.adapters.base import WeightAdapter
    from lib_lora.core.workspace import Workspace


@dataclass(frozen=True, eq=False)
class PaddedAdapter(DenseAdapter):
    """ΔW with zeros for the channels it does not know, such as the mask's of an inpainting model.

    Attributes:
        inner: The adapter of (out, channels, kh, kw).
        channels: How many input channels it knows.
        layer_shape: (out, more channels, kh, kw).
    """

    inner: WeightAdapter
    channels: int
    layer_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The layer's."""
        return self.layer_shape

    @property
    def algorithm(self) -> str:
        """Of the adapter inside."""
        return self.inner.algorithm

    @property
    def rank(self) -> int:
        """Of the adapter inside."""
        return self.inner.rank

    @property
    def row_step(self) -> int:
        """Of the adapter inside."""
        return self.inner.row_step

    @property
    def needs_base(self) -> bool:
        """Of the adapter inside."""
        return self.inner.needs_base

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it was made for this shape."""
        return tuple(shape) == self.shape

    def bound(self, base_peak: float = 1.0) -> float:
        """Of the adapter inside."""
        return self.inner.bound(base_peak)

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the known channels: factor · ΔW[rows]."""
        known = self.channels * math.prod(self.layer_shape[2:])
        self.inner.add_to(total[:, :known], base[:, : self.channels], rows, factor, workspace)
