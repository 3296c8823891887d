"""Pictures of a training set at given areas, with their captions."""

from __future__ import annotations

import math
import os
import re
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lib_lora.core.opening import reason_of, shown
from lib_lora.core.saving import check_writable, no_progress, save_bytes
from lib_lora.errors import FileError, JobError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from lib_lora.core.saving import Progress

    Interpolation = Literal["area", "cubic", "lanczos4"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
QUALITY = 100
_FILTERS = {"cubic": Image.Resampling.BICUBIC, "lanczos4": Image.Resampling.LANCZOS}
_RESOLUTION = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""PIL's names of 16 bits a pixel; it would cut them off at 255."""
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What PIL raises for damaged files."""


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


class Skipped(NamedTuple):
    """A file that is no usable picture, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ResizedImages:
    """What became of a folder.

    Attributes:
        folder: Where the new files are.
        pictures: Pictures that were read.
        written: Pictures that were written.
        copied: Other files that were copied.
        skipped: Pictures that could not be used.
    """

    folder: str
    pictures: int
    written: int
    copied: int
    skipped: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"skipped": [file._asdict() for file in self.skipped]}

    def __str__(self) -> str:
        """For people."""
        done = f"{self.folder}: {self.written} pictures of {self.pictures}, {self.copied} other files copied"
        return "\n".join((done, *(f"skipped {file.name}: {file.reason}" for file in self.skipped)))


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


class _Outcome(NamedTuple):
    """What became of one picture: how many were written and copied, and why it was skipped."""

    written: int = 0
    copied: int = 0
    skipped: Skipped | None = None


def resize_images(
    source: Path,
    folder: Path,
    form: ImageForm,
    *,
    associated: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ResizedImages:
    """Write each picture of a folder once for every area, as ``NAME+WIDTHxHEIGHT.jpg``; none is enlarged.

    Pictures are turned as their EXIF data says, and laid on white where they are transparent. Those that can not be
    read are told and left out. What is no picture is copied. Source of the names: kohya's
    resize_images_to_resolution.py.

    Args:
        source: The folder; those inside of it are not looked at.
        folder: Where the new files go; made if it is missing.
        form: How they are written.
        associated: Whether other files of a picture's name, such as captions, are copied once for every area, named
            as it is, and not as they are.
        overwrite: Whether older files are replaced.
        progress: Told the pictures done. What is written until a job is cancelled is whole, and stays.

    Raises:
        FileError: If the folder or a file that is copied can not be read.
        OutputError: If a file can not be written, or exists and `overwrite` is not set.
        JobError: If there is no picture, or two would get one name.
    """
    pictures, others = _listed(source)
    own = {picture: [other for other in others if associated and other.stem == picture.stem] for picture in pictures}
    rest = sorted(set(others).difference(*own.values()))
    names = [name for picture in pictures for name in (*_names(picture, form), *_copies(own[picture], form))]
    _check_names([*names, *(other.name for other in rest)], folder, source, overwrite=overwrite)

    def work(picture: Path) -> _Outcome:
        return _resize(picture, folder, form, own[picture], overwrite)

    outcomes: list[_Outcome] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for outcome in pool.map(work, pictures):
                outcomes.append(outcome)
                progress(len(outcomes), len(pictures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for other in rest:
        save_bytes(folder / other.name, _read(other), overwrite=overwrite)
    written, copied = sum(outcome.written for outcome in outcomes), sum(outcome.copied for outcome in outcomes)
    skipped = tuple(outcome.skipped for outcome in outcomes if outcome.skipped)
    return ResizedImages(str(folder), len(pictures), written, copied + len(rest), skipped)


def _listed(source: Path) -> tuple[list[Path], list[Path]]:
    """Pictures and other files."""
    try:
        files = sorted(path for path in source.iterdir() if path.is_file())
    except OSError as error:
        raise FileError(f"{shown(source)} can not be read: {reason_of(error)}") from error
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not pictures:
        raise JobError(f"{shown(source)} has no pictures ({', '.join(SUFFIXES)})")
    return pictures, [file for file in files if file not in set(pictures)]


def _names(picture: Path, form: ImageForm, suffix: str = "") -> list[str]:
    return [f"{picture.stem}+{resolution}{suffix or form.suffix}" for resolution in form.resolutions]


def _copies(others: Iterable[Path], form: ImageForm) -> list[str]:
    return [name for other in others for name in _names(other, form, other.suffix)]


def _check_names(names: Sequence[str], folder: Path, source: Path, *, overwrite: bool) -> None:
    """Before anything is written."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise JobError(f"two files of {shown(source)} would both become {twice[0]}; rename one of them")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        same = folder.samefile(source)
    except OSError as error:
        raise OutputError(f"the folder {shown(folder)} can not be made: {reason_of(error)}") from error
    if same:
        raise JobError(f"{shown(folder)} is the folder of the pictures itself; choose another one")
    check_writable(folder)
    older = [name for name in names if (folder / name).exists()]
    if older and not overwrite:
        raise OutputError(f"{shown(folder)} has {len(older)} of these files already, such as {older[0]}; use --force")


def _resize(picture: Path, folder: Path, form: ImageForm, own: Sequence[Path], overwrite: bool) -> _Outcome:
    try:
        image = _open(picture)
        files = [_encoded(_shaped(image, resolution, form), form) for resolution in form.resolutions]
    except UnidentifiedImageError:
        return _Outcome(skipped=Skipped(picture.name, "it is no picture"))
    except _UNREADABLE as error:
        return _Outcome(skipped=Skipped(picture.name, str(error).partition("\n")[0] or "it is damaged"))
    for name, data in zip(_names(picture, form), files, strict=True):
        save_bytes(folder / name, data, overwrite=overwrite)
    for other in own:
        for name in _names(other, form, other.suffix):
            save_bytes(folder / name, _read(other), overwrite=overwrite)
    return _Outcome(len(files), len(own) * len(form.resolutions))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{shown(path)} can not be read: {reason_of(error)}") from error


def _open(path: Path) -> Image.Image:
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


def _shaped(image: Image.Image, resolution: Resolution, form: ImageForm) -> Image.Image:
    """The picture at an area, cropped."""
    width, height = size = resolution.size_of(*image.size)
    step = form.divisible_by
    if min(size) < step:
        raise ValueError(f"at {resolution} it has {width}x{height} pixels, too few for sides divisible by {step}")
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


def _encoded(image: Image.Image, form: ImageForm) -> bytes:
    data = BytesIO()
    if form.png:
        image.save(data, "PNG")
    else:
        image.save(data, "JPEG", quality=QUALITY, subsampling=0)
    return data.getvalue()
