"""A picture of a training set at a given area: upright, in RGB, cropped, and encoded."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from pathlib import Path

    Interpolation = Literal["area", "cubic", "lanczos4"]

QUALITY = 100
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What PIL raises for damaged files."""
_FILTERS = {"cubic": Image.Resampling.BICUBIC, "lanczos4": Image.Resampling.LANCZOS}
_RESOLUTION = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""PIL's names of 16 bits a pixel; it would cut them off at 255."""


class Resolution(NamedTuple):
    """An area, as the width and height of one rectangle that has it."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> tuple[Resolution, ...]:
        """Resolutions such as ``512x512,384x384``.

        Raises:
            JobError: If one is none.
        """
        found = [(part.strip(), _RESOLUTION.fullmatch(part.strip())) for part in text.split(",")]
        wrong = [part for part, match in found if match is None]
        if wrong:
            raise JobError(f"{wrong[0][:40]!r} is no resolution; write WIDTHxHEIGHT, such as 512x512,384x384")
        return tuple(dict.fromkeys(cls(int(match[1]), int(match[2])) for _, match in found if match))

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Largest size of this area at most, with the sides' ratio of a picture, and not larger than that."""
        area = self.width * self.height
        if width * height <= area:
            return width, height
        return max(1, math.isqrt(width * area // height)), max(1, math.isqrt(height * area // width))

    def __str__(self) -> str:
        """As it was written."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class ImageForm:
    """How pictures are written.

    Attributes:
        resolutions: One picture is written for each, of its area at most.
        divisible_by: Both sides are cropped in the middle to multiples of it.
        interpolation: ``area`` is the mean of what a pixel covers; the others are PIL's filters, which are widened
            as the picture shrinks.
        png: Whether .png files are written, not .jpg.

    Raises:
        JobError: If there is no resolution, or `divisible_by` is smaller than 1.
    """

    resolutions: tuple[Resolution, ...]
    divisible_by: int = 1
    interpolation: Interpolation = "area"
    png: bool = False

    def __post_init__(self) -> None:
        if not self.resolutions or self.divisible_by < 1:
            raise JobError(f"there must be a resolution, and sides can not be divisible by {self.divisible_by}")

    @property
    def suffix(self) -> str:
        """Of the pictures' names."""
        return ".png" if self.png else ".jpg"


def open_picture(path: Path) -> Image.Image:
    """The picture upright, in 8-bit RGB, on white where it is transparent."""
    opened = Image.open(path)
    with opened:
        image = ImageOps.exif_transpose(opened) or opened
        if image.mode in _DEEP:
            return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
        if "A" not in image.getbands() and "transparency" not in image.info:
            return image.convert("RGB")
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")


def why_unreadable(error: Exception) -> str:
    """What one of `UNREADABLE` says, for people."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture"
    return str(error).partition("\n")[0] or "it is damaged"


def scaled(size: tuple[int, int], resolution: Resolution, form: ImageForm) -> tuple[int, int]:
    """What a picture is shrunk to before it is cropped."""
    width, height = resolution.size_of(*size)
    if min(width, height) < form.divisible_by:
        raise ValueError(
            f"at {resolution} it has {width}x{height} pixels, too few for sides divisible by {form.divisible_by}"
        )
    return width, height


def shaped(image: Image.Image, resolution: Resolution, form: ImageForm) -> Image.Image:
    """The picture at an area, cropped."""
    width, height = size = scaled(image.size, resolution, form)
    step = form.divisible_by
    if size != image.size:
        image = (
            _averaged(image, size) if form.interpolation == "area" else image.resize(size, _FILTERS[form.interpolation])
        )
    left, top = width % step // 2, height % step // 2
    return image.crop((left, top, left + width - width % step, top + height - height % step))


def _averaged(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Each pixel is the mean of the rectangle that it covers, pixels at its borders in proportion."""
    width, height = size
    rows = _means(np.asarray(image), height)
    means = _means(rows.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return Image.fromarray(np.rint(means).astype(np.uint8))


def _means(rows: Any, count: int) -> Any:
    """Means of `count` parts of equal height, (height, width, 3) → (count, width, 3) in float64."""
    first, rest = np.divmod(np.arange(count + 1) * len(rows), count)
    sums = np.add.reduceat(rows, first[:-1], axis=0, dtype=np.float64)
    cut = rows[np.minimum(first, len(rows) - 1)] * (rest / count)[:, None, None]
    return (sums + np.diff(cut, axis=0)) * (count / len(rows))


def encoded(image: Image.Image, form: ImageForm) -> bytes:
    """The content of its file."""
    data = BytesIO()
    if form.png:
        image.save(data, "PNG")
    else:
        image.save(data, "JPEG", quality=QUALITY, subsampling=0)
    return data.getvalue()
