"""The size at which a picture is trained: of about a given area, with about its own ratio of sides.

Source: BucketManager and make_bucket_resolutions of kohya's sd-scripts (library/train_util.py, library/model_util.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lib_lora.train.data.options import DataOptions


class Size(NamedTuple):
    """In pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.width}x{self.height}"


class Fit(NamedTuple):
    """How a picture becomes one of its bucket.

    Attributes:
        bucket: What it is cropped to.
        resized: What it is scaled to before; not smaller than the bucket.
    """

    bucket: Size
    resized: Size


@dataclass(frozen=True)
class Buckets:
    """Which sizes there are.

    Attributes:
        largest: Its area is that of a bucket at most.
        step: Sides are multiples of it.
        given: The sizes to choose from, ascending; () where each picture makes its own, and none is enlarged.
        enlarges: Whether pictures that are smaller than a given size are enlarged.
    """

    largest: Size
    step: int
    given: tuple[Size, ...] = ()
    enlarges: bool = False

    @classmethod
    def of(cls, options: DataOptions) -> Buckets:
        """As the options say."""
        largest = Size(*options.size)
        if not options.enable_bucket:
            return cls(largest, 1, (largest,), not options.bucket_no_upscale)
        step = options.bucket_reso_steps
        if options.bucket_no_upscale:
            return cls(largest, step)
        return cls(largest, step, _given(largest, options.min_bucket_reso, options.max_bucket_reso, step), True)

    def fit(self, size: Size) -> Fit:
        """Where a picture goes.

        Raises:
            ValueError: If it is too small or too narrow for every bucket.
        """
        if not self.given:
            return self._own(size)
        fit = self._chosen(size)
        if not self.enlarges and fit.resized.width > size.width:
            raise ValueError(f"it has {size} pixels, too few for {fit.bucket}, and is not enlarged")
        return fit

    def _chosen(self, size: Size) -> Fit:
        """The given size of nearest ratio, which the picture covers."""
        ratio = size.width / size.height
        bucket = size if size in self.given else min(self.given, key=lambda one: abs(one.width / one.height - ratio))
        higher = ratio > bucket.width / bucket.height
        scale = bucket.height / size.height if higher else bucket.width / size.width
        return Fit(bucket, Size(_round(size.width * scale), _round(size.height * scale)))

    def _own(self, size: Size) -> Fit:
        """Shrunk to the area if it is larger, so that one side is a multiple of the step; then cropped to multiples."""
        resized = size if size.width * size.height <= math.prod(self.largest) else self._shrunk(size)
        bucket = Size(resized.width - resized.width % self.step, resized.height - resized.height % self.step)
        if min(bucket) >= self.step:
            return Fit(bucket, resized)
        smallest = f"{self.step}x{self.step}, the smallest bucket"
        if min(size) < self.step:
            raise ValueError(f"it has {size} pixels and is smaller than {smallest}")
        raise ValueError(
            f"it has {size} pixels, which do not fit {self.largest} without a side smaller than {smallest}; "
            "raise resolution, or lower bucket_reso_steps"
        )

    def _shrunk(self, size: Size) -> Size:
        """The width or the height becomes a multiple of the step, whichever changes the ratio of the bucket less."""
        ratio = size.width / size.height
        width = math.sqrt(math.prod(self.largest) * ratio)
        height = math.prod(self.largest) / width
        wide, high = self._whole(width), self._whole(height)
        by_width = self._error(ratio, wide, self._whole(wide / ratio))
        by_height = self._error(ratio, self._whole(high * ratio), high)
        return Size(wide, _round(wide / ratio)) if by_width < by_height else Size(_round(high * ratio), high)

    def _whole(self, side: float) -> int:
        rounded = _round(side)
        return rounded - rounded % self.step

    @staticmethod
    def _error(ratio: float, width: int, height: int) -> float:
        return abs(width / height - ratio) if height else math.inf


def _round(side: float) -> int:
    return int(side + 0.5)


def _given(largest: Size, low: int, high: int, step: int) -> tuple[Size, ...]:
    """Every width from `low` to `high` with the largest height that keeps to the area, and the same turned."""
    area = math.prod(largest)
    low, high = low - low % step, math.ceil(high / step) * step
    square = int(math.sqrt(area) // step) * step
    sizes = {Size(square, square)}
    for width in range(max(low, step), high + 1, step):
        height = min(high, area // width // step * step)
        if height >= max(low, step):
            sizes |= {Size(width, height), Size(height, width)}
    return tuple(sorted(sizes))
