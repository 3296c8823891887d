"""How many singular values of a layer are kept.

Source of the dynamic methods: kohya's resize_lora.py, whose ranks are one larger than their names say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Dynamic: TypeAlias = Literal["sv_ratio", "sv_fro", "sv_cumulative"]
RANKS_AT_MOST = "at most: the ranks are chosen by the layers' own singular values"
"""A preview's note where `RankRule.depends_on_values`."""
KOHYAS_ZERO = 1e-6
"""A largest singular value up to this is that of a layer that changes nothing, for kohya."""


@dataclass(frozen=True)
class RankRule:
    """A rank for each layer.

    Attributes:
        rank: Of Linear and 1x1 convolutions; with a dynamic method, the largest.
        conv_rank: The same for larger kernels; None for `rank`.
        dynamic: A layer's rank is the number of its singular values that are at least 1 / parameter of the largest
            (``sv_ratio``), or the smallest that keeps this part of their sum (``sv_cumulative``) or of the Frobenius
            norm (``sv_fro``); None for the same rank in every layer.
        parameter: Of the dynamic method.
        kohya: Whether ranks are kohya's: dynamic ones are one larger, 1x1 convolutions have `conv_rank`, and a rank
            may be larger than that of the file, which is then filled with zeros.

    Raises:
        JobError: If a rank is smaller than 1, or the parameter is none for the method.
    """

    rank: int
    conv_rank: int | None = None
    dynamic: Dynamic | None = None
    parameter: float | None = None
    kohya: bool = False

    def __post_init__(self) -> None:
        for name, rank in (("rank", self.rank), ("rank of convolutions", self.conv_rank)):
            if rank is not None and rank < 1:
                raise JobError(f"the {name} is {rank}; choose one of at least 1")
        if self.dynamic is None:
            if self.parameter is not None:
                raise JobError(f"the parameter {self.parameter:g} belongs to a dynamic method, and none is chosen")
            return
        value = math.nan if self.parameter is None else self.parameter
        fits = 1 <= value < math.inf if self.dynamic == "sv_ratio" else 0 < value <= 1
        if not fits:
            wanted = "a number from 1, such as 2" if self.dynamic == "sv_ratio" else "a number up to 1, such as 0.9"
            raise JobError(f"{self.dynamic} needs {wanted} as its parameter, not {self.parameter}")

    def largest(self, shape: Sequence[int]) -> int:
        """The largest rank of a layer of this shape, (out, in) or (out, in, kh, kw)."""
        is_conv = len(shape) == 4 if self.kohya else math.prod(shape[2:]) > 1
        return self.rank if self.conv_rank is None or not is_conv else self.conv_rank

    @property
    def depends_on_values(self) -> bool:
        """Whether `of` may give fewer than `most`."""
        return self.dynamic is not None or self.kohya

    def most(self, shape: Sequence[int], count: int) -> int:
        """The largest rank that `of` gives.

        Args:
            shape: (out, in) or (out, in, kh, kw).
            count: Of singular values.
        """
        return min(self.largest(shape), _smaller_side(shape) if self.kohya else count)

    def of(self, values: Tensor, shape: Sequence[int]) -> int:
        """Rank of a layer: 1 at least, and at most what there is, or for kohya the smaller side of ΔW.

        Args:
            values: Its singular values, in descending order, without alpha.
            shape: (out, in) or (out, in, kh, kw).
        """
        largest = self.most(shape, len(values))
        if self.kohya and values[0] <= KOHYAS_ZERO:
            return 1
        if self.dynamic is None or self.parameter is None:
            return largest
        own = (_kohyas_rank if self.kohya else _named_rank)(values.double(), self.dynamic, self.parameter, shape)
        return min(own, largest)


def _smaller_side(shape: Sequence[int]) -> int:
    return min(shape[0], math.prod(shape[1:]))


def _named_rank(values: Tensor, dynamic: Dynamic, parameter: float, _: Sequence[int]) -> int:
    if dynamic == "sv_ratio":
        return max(1, int((values * parameter >= values[0]).sum())) if values[0] > 0 else 1
    return min(_first_above(values, dynamic, parameter) + 1, len(values))


def _kohyas_rank(values: Tensor, dynamic: Dynamic, parameter: float, shape: Sequence[int]) -> int:
    """Kohya counts in all singular values of ΔW, whose last ones are zeros."""
    count = _smaller_side(shape)
    index = (
        int((values > values[0] / parameter).sum())
        if dynamic == "sv_ratio"
        else _first_above(torch.cat((values, values.new_zeros(count - len(values)))), dynamic, parameter) + 1
    )
    return max(1, min(index, count - 1)) + 1


def _first_above(values: Tensor, dynamic: Dynamic, parameter: float) -> int:
    """Index of the first value with which the part is reached."""
    parts, wanted = (values.square(), parameter**2) if dynamic == "sv_fro" else (values, parameter)
    whole = parts.cumsum(0)
    return int(torch.searchsorted(whole, wanted * whole[-1].item()))
