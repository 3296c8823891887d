"""Pictures of a training set at given areas, with their captions."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from lib_lora.core.opening import reason_of, shown
from lib_lora.core.saving import DiskSpace, check_writable, no_progress, save_bytes
from lib_lora.errors import FileError, JobError, OutputError
from lib_lora.tools.outcome import Outcome
from lib_lora.tools.pictures import UNREADABLE, encoded, open_picture, scaled, shaped, why_unreadable
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from lib_lora.core.saving import Progress
    from lib_lora.tools.pictures import ImageForm

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TICK_SECONDS = 0.2
"""So long a job goes on without an occasion to cancel it."""
_MOST_BYTES, _MOST_HEADER = 6, 4096
"""Of a picture, for each pixel and beside: noise takes 4.9 and some hundreds."""
AT_MOST_NOTE = "at most: how well pictures are compressed, and whether they are whole, is known when they are read"


class Skipped(NamedTuple):
    """A file that is no usable picture, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ResizedImages(Outcome):
    """What became of a folder.

    Attributes:
        pictures: Pictures that were read.
        made: Pictures that were written.
        copied: Other files that were copied.
        skipped: Pictures that could not be used.
    """

    pictures: int
    made: int
    copied: int
    skipped: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return super().to_dict() | {"skipped": [file._asdict() for file in self.skipped]}

    def __str__(self) -> str:
        """For people."""
        done = f"{self.path}: {self.made} pictures of {self.pictures}, {self.copied} other files copied"
        skipped = [f"skipped {file.name}: {file.reason}" for file in self.skipped]
        return "\n".join([f"{done}, {self.size_text()}", *skipped, *self.notes, *self.preview_lines()])


class _Done(NamedTuple):
    """What became of one picture: how many were written and copied, their bytes, its pixels, or why not."""

    made: int = 0
    copied: int = 0
    size: int = 0
    pixels: int = 0
    skipped: Skipped | None = None


def resize_images(
    source: Path,
    folder: Path,
    form: ImageForm,
    *,
    associated: bool = False,
    overwrite: bool = False,
    preview: bool = False,
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
        preview: Whether all is checked as far as the files' beginnings tell, and nothing is written.
        progress: Told the pixels done. What is written until a job is cancelled is whole, and stays.

    Raises:
        FileError: If the folder or a file that is copied can not be read.
        OutputError: If a file can not be written, or exists and `overwrite` is not set.
        JobError: If there is no picture, or two would get one name.
    """
    pictures, others = _listed(source)
    own = {picture: [other for other in others if associated and other.stem == picture.stem] for picture in pictures}
    rest = sorted(set(others).difference(*own.values()))
    names = [name for picture in pictures for name in (*_names(picture, form), *_copies(own[picture], form))]
    names += [other.name for other in rest]
    free = _check_names(names, folder, source, overwrite=overwrite, preview=preview)
    work = Work(progress)
    planned = {picture: _planned(picture, form, own[picture], work) for picture in pictures}
    job = _Job(folder, form, own, overwrite)
    done = list(planned.values()) if preview else job.resize_all(planned, work)
    for other in () if preview else rest:
        save_bytes(folder / other.name, _read(other), overwrite=overwrite)
    copied = sum(other.stat().st_size for other in rest)
    return ResizedImages(
        paths=(folder,),
        size=sum(one.size for one in done) + copied,
        disk=DiskSpace(sum(one.size for one in planned.values()) + copied, free),
        metadata={},
        notes=(AT_MOST_NOTE,) if preview else (),
        written=not preview,
        at_most=preview,
        pictures=len(pictures),
        made=sum(one.made for one in done),
        copied=sum(one.copied for one in done) + len(rest),
        skipped=tuple(one.skipped for one in done if one.skipped),
    )


class _Job(NamedTuple):
    """Where and how pictures are written, and what goes with each."""

    folder: Path
    form: ImageForm
    own: Mapping[Path, Sequence[Path]]
    overwrite: bool

    def resize_all(self, planned: Mapping[Path, _Done], work: Work) -> list[_Done]:
        """Write all pictures, on all processors."""
        work.expect(sum(plan.pixels for plan in planned.values()))
        outcomes: list[_Done] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = {picture: pool.submit(self._resize, picture) for picture in planned}
            try:
                for picture, future in futures.items():
                    while not wait((future,), TICK_SECONDS).done:
                        work.tick()
                    outcomes.append(future.result())
                    work.add(planned[picture].pixels)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return outcomes

    def _resize(self, picture: Path) -> _Done:
        try:
            image = open_picture(picture)
            files = [encoded(shaped(image, resolution, self.form), self.form) for resolution in self.form.resolutions]
        except UNREADABLE as error:
            return _Done(skipped=Skipped(picture.name, why_unreadable(error)))
        contents = dict(zip(_names(picture, self.form), files, strict=True))
        for other in self.own[picture]:
            contents |= dict.fromkeys(_names(other, self.form, other.suffix), _read(other))
        for name, data in contents.items():
            save_bytes(self.folder / name, data, overwrite=self.overwrite)
        return _Done(len(files), len(contents) - len(files), sum(map(len, contents.values())))


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


def _check_names(names: Sequence[str], folder: Path, source: Path, *, overwrite: bool, preview: bool) -> int:
    """Before anything is written; gives back the bytes that are free there."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise JobError(f"two files of {shown(source)} would both become {twice[0]}; rename one of them")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
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
    free = shutil.disk_usage(folder).free
    for path in missing if preview else ():
        path.rmdir()
    return free


def _planned(picture: Path, form: ImageForm, own: Sequence[Path], work: Work) -> _Done:
    """What will become of a picture, as far as its beginning tells."""
    work.tick()
    try:
        with Image.open(picture) as opened:
            size = opened.size
        sides = [scaled(size, resolution, form) for resolution in form.resolutions]
    except UNREADABLE as error:
        return _Done(skipped=Skipped(picture.name, why_unreadable(error)))
    copied = sum(other.stat().st_size for other in own) * len(sides)
    most = sum(_MOST_BYTES * width * height + _MOST_HEADER for width, height in sides)
    return _Done(len(sides), len(own) * len(sides), most + copied, pixels=math.prod(size))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{shown(path)} can not be read: {reason_of(error)}") from error
