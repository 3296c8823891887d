"""What every LoRA algorithm offers, whatever its mathematics."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeGuard

    from torch import Tensor


class Factors(NamedTuple):
    """A low-rank update as the file has it: ΔW = scale · up @ down.

    The scale stays a number, so that all factors of a sum are folded into `up` in one multiplication.

    Attributes:
        up: (out, rank), in the file's dtype.
        down: (rank, in) or (rank, in·kh·kw), in the file's dtype.
        scale: alpha / rank.
    """

    up: Tensor
    down: Tensor
    scale: float


class WeightAdapter(Protocol):
    """The update of one layer's weight by one network, at strength 1."""

    @property
    def algorithm(self) -> str:
        """Short name of the mathematics, such as ``LoRA`` or ``LoHa``."""
        ...

    @property
    def rank(self) -> int:
        """Rank of the update."""
        ...

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether ΔW has the shape of a weight, (out, in) or (out, in, kh, kw)."""
        ...

    def shape_text(self) -> str:
        """ΔW's shape as the user is told it, such as ``(320, 768)``."""
        ...

    def bound(self) -> float:
        """An upper bound of max |ΔW|; not finite if a factor holds NaN or infinity."""
        ...

    def delta_weight(self, base: Tensor) -> Tensor:
        """ΔW at strength 1.

        Args:
            base: The untouched weight, float32, (out, in) or (out, in, kh, kw); algorithms that do not depend on it
                read its shape and device only.

        Returns:
            float32, of the shape and on the device of `base`.
        """
        ...


class LowRankAdapter(WeightAdapter, Protocol):
    """An adapter whose ΔW is a product of two small matrices, so that many can be stacked into one GEMM."""

    def factors(self) -> Factors:
        """The two matrices and their scale."""
        ...

    def sliced(self, rank: int) -> LowRankAdapter:
        """The first `rank` ranks alone, at the scale of the whole (DyLoRA, ``dyn=``)."""
        ...


def is_low_rank(adapter: WeightAdapter) -> TypeGuard[LowRankAdapter]:
    """Whether an adapter has factors; asked once for each class, because a switch asks some thousand times."""
    return _has_factors(type(adapter))


@functools.cache
def _has_factors(kind: type) -> bool:
    return callable(getattr(kind, "factors", None))
