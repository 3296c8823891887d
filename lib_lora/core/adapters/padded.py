"""An adapter for a layer with more input channels than it knows: it changes the first ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.core.adapters.wrapped import WrappedAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lib_lora.core.workspace import Workspace


@dataclass(frozen=True, eq=False)
class PaddedAdapter(WrappedAdapter):
    """ΔW with zeros for the channels it does not know, such as the mask's of an inpainting model.

    Attributes:
        channels: How many input channels the adapter inside knows; the layer has more.
    """

    channels: int

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it was made for this shape."""
        return tuple(shape) == self.shape

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the known channels: factor · ΔW[rows]."""
        known = self.channels * math.prod(self.layer_shape[2:])
        self.inner.add_to(total[:, :known], base[:, : self.channels], rows, factor, workspace)
