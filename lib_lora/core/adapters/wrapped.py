"""An adapter that shows a part of a layer, or of itself, to another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.core.adapters.base import DenseAdapter

if TYPE_CHECKING:
    from lib_lora.core.adapters.base import WeightAdapter


@dataclass(frozen=True, eq=False)
class WrappedAdapter(DenseAdapter):
    """What it does not say itself, the adapter inside says.

    Attributes:
        inner: The adapter inside.
        layer_shape: Shape of the layer.
    """

    inner: WeightAdapter
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

    def bound(self, base_peak: float = 1.0) -> float:
        """Of the adapter inside: no number of the part is larger."""
        return self.inner.bound(base_peak)
