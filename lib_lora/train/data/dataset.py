"""A training set: its pictures, each with its size and caption, before one of them is encoded."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lib_lora.core.saving import no_progress
from lib_lora.errors import JobError
from lib_lora.tools.images import Skipped
from lib_lora.train.data.buckets import Buckets
from lib_lora.train.data.captions import possible_captions
from lib_lora.train.data.measuring import Measurements
from lib_lora.train.data.options import PLACES
from lib_lora.train.data.order import Bucket, Order
from lib_lora.train.data.pictures import Picture
from lib_lora.train.data.prefetch import prefetched
from lib_lora.train.data.report import BucketReport, DataReport, FolderReport
from lib_lora.train.data.sources import read_sources

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from lib_lora.core.saving import Progress
    from lib_lora.train.data.buckets import Size
    from lib_lora.train.data.folders import Entry, Folder
    from lib_lora.train.data.measuring import Measured
    from lib_lora.train.data.options import DataOptions
    from lib_lora.train.data.sources import Source

READERS = 8
"""Pictures read at once at most: each takes its pixels' memory."""


@dataclass(frozen=True)
class Dataset:
    """Pictures to train on.

    Attributes:
        options: How they are used, where they have none of their own.
        folders: Where they come from, those for training first.
        pictures: All that can be used.
        report: What was found.
    """

    options: DataOptions
    folders: tuple[Folder, ...]
    pictures: tuple[Picture, ...]
    report: DataReport

    @property
    def is_multiplied(self) -> bool:
        """Whether any picture is learned at another strength of the network than 1."""
        return any(picture.network_multiplier != 1 for picture in self.pictures)

    def buckets(self) -> Mapping[Size, list[int]]:
        """Size, ascending → indices of its pictures, each as often as it is used in an epoch."""
        return _buckets(self.pictures)

    def captions(self) -> list[str]:
        """Each that a picture may have, once, where nothing shuffles, drops or chooses tags."""
        possible = (one for picture in self.pictures for one in possible_captions(picture.caption, picture.options))
        return list(dict.fromkeys(possible))

    def own_options(self, picture: Picture) -> dict[str, Any]:
        """What dataset_config says otherwise of a picture, beside where it lies."""
        all_of = vars(self.options)
        own = ((name, value) for name, value in vars(picture.options).items() if name not in PLACES)
        return {name: value for name, value in own if value != all_of[name]}

    def order(self, processes: int = 1) -> Order:
        """Which pictures are in which batch: those of one size, and of one size of batches."""
        sizes = sorted({picture.options.train_batch_size for picture in self.pictures})
        by_size = {size: _buckets(self.pictures, size).values() for size in sizes}
        buckets = [Bucket(one, size * processes) for size, found in by_size.items() for one in found]
        return Order(buckets, self.options.seed)


def open_dataset(options: DataOptions, progress: Progress = no_progress) -> Dataset:
    """Find all pictures and captions, and read each picture once to know that it is whole.

    Args:
        options: Where they are.
        progress: Told the pictures that were read.

    Raises:
        FileError: If a folder or list can not be read.
        JobError: If there are no pictures, or none of them can be used.
        OutputError: If the folder for encoded pictures and captions can not be written to.
    """
    sources, notes = read_sources(options)
    files = list(dict.fromkeys(entry.path for source in sources for entry in source.folder.entries))
    found = dict(zip(files, _measured(files, options, progress), strict=True))
    read = [_Read(source, *_usable(source, found)) for source in sources]
    skipped = [file for one in read for file in (*one.source.folder.skipped, *one.skipped)]
    matched, more = _matched(read)
    if not matched:
        reason = f": {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise JobError(f"none of the {len(files)} pictures can be trained on{reason}")
    report = DataReport(
        folders=tuple(_told(one) for one in read),
        buckets=tuple(BucketReport(size, len(indices)) for size, indices in _buckets(matched).items()),
        ratio_error=sum(map(_ratio_error, matched)) / len(matched),
        train_images=_count(read, is_reg=False),
        reg_images=_count(read, is_reg=True),
        skipped=tuple(skipped),
        notes=(*notes, *more, *_note_of_strengths(matched)),
    )
    return Dataset(options, tuple(source.folder for source in sources), matched, report)


class _Read(NamedTuple):
    """A source, and what of it can be used."""

    source: Source
    pictures: list[Picture]
    skipped: list[Skipped]


def _measured(files: Sequence[Path], options: DataOptions, progress: Progress) -> Iterator[Measured | str]:
    """For each file its size, or why it can not be used."""
    measurements = Measurements(options.cache_folder if options.makes_files else None)

    def look(path: Path) -> Measured | str:
        try:
            return measurements.measure(path)
        except ValueError as error:
            return str(error)

    for done, found in enumerate(prefetched(look, files, min(READERS, os.cpu_count() or 1)), 1):
        progress(done, len(files))
        yield found
    measurements.keep()


def _usable(source: Source, found: Mapping[Path, Measured | str]) -> tuple[list[Picture], list[Skipped]]:
    """Pictures of a source that fit a bucket, and why others can not be used."""
    buckets = Buckets.of(source.options)
    looked_at = [_picture(entry, source, found[entry.path], buckets) for entry in source.folder.entries]
    pictures = [one for one in looked_at if isinstance(one, Picture)]
    return pictures, [one for one in looked_at if isinstance(one, Skipped)]


def _picture(entry: Entry, source: Source, measured: Measured | str, buckets: Buckets) -> Picture | Skipped:
    """Ready to be read, or why it can not be used."""
    folder, options = source.folder, source.options
    file = f"{folder.name}/{entry.path.name}"
    if isinstance(measured, str):
        return Skipped(file, measured)
    try:
        fit = buckets.fit(measured.size)
    except ValueError as error:
        return Skipped(file, str(error))
    return Picture(
        name=_name(folder, entry.path, options.picture_folder),
        path=entry.path,
        identity=measured.identity,
        size=measured.size,
        fit=fit,
        caption=entry.caption,
        options=options,
        repeats=folder.repeats,
        is_reg=folder.is_reg,
        network_multiplier=entry.network_multiplier,
    )


def _name(folder: Folder, path: Path, base: Path) -> str:
    """What tells a picture from all others of the set, wherever the set lies."""
    if folder.is_list:
        return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()
    return f"{'reg/' if folder.is_reg else ''}{folder.name}/{path.name}"


def _note_of_strengths(pictures: Iterable[Picture]) -> list[str]:
    strengths = [one.network_multiplier for one in pictures if one.network_multiplier != 1]
    what = f"{len(strengths)} pictures are learned with the network at another strength than 1"
    return [f"{what}: {min(strengths):.3g} to {max(strengths):.3g}"] if strengths else []


def _count(read: Iterable[_Read], *, is_reg: bool) -> int:
    """Pictures of an epoch, as folders and lists say."""
    return sum(picture.repeats for one in read for picture in one.pictures if picture.is_reg == is_reg)


def _matched(read: Sequence[_Read]) -> tuple[tuple[Picture, ...], list[str]]:
    """What is used, those for training first: of each dataset as many regularisation pictures as others."""
    groups: dict[int, list[_Read]] = {}
    for one in read:
        groups.setdefault(one.source.group, []).append(one)
    used, notes = list[Picture](), list[str]()
    for group in groups.values():
        wanted, named = _count(group, is_reg=False), _count(group, is_reg=True)
        if named > wanted:
            notes.append(f"only {wanted} of {named} regularisation pictures are used, as many as others")
        used += _as_many([picture for one in group for picture in one.pictures], wanted)
    return tuple(sorted(used, key=lambda picture: picture.is_reg)), notes


def _as_many(pictures: Sequence[Picture], wanted: int) -> Iterator[Picture]:
    """As many regularisation pictures as others: the first ones of them, or all, and some of them once more.

    Source: DreamBoothDataset of kohya's sd-scripts (library/train_util.py).
    """
    yield from (picture for picture in pictures if not picture.is_reg)
    used: list[Picture] = []
    count = 0
    for picture in pictures:
        if picture.is_reg and count < wanted:
            used.append(picture)
            count += picture.repeats
    rounds, rest = divmod(max(0, wanted - count), len(used) or 1)
    yield from (replace(picture, repeats=picture.repeats + rounds + (i < rest)) for i, picture in enumerate(used))


def _buckets(pictures: Iterable[Picture], batch_size: int | None = None) -> dict[Size, list[int]]:
    """Size, ascending → indices; of all pictures, or of those of one size of batches."""
    found: defaultdict[Size, list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        if batch_size in (None, picture.options.train_batch_size):
            found[picture.fit.bucket] += [index] * picture.repeats
    return dict(sorted(found.items()))


def _ratio_error(picture: Picture) -> float:
    (width, height), (wide, high) = picture.size, picture.fit.bucket
    return abs(wide / high - width / height)


def _told(read: _Read) -> FolderReport:
    folder, usable = read.source.folder, {picture.path for picture in read.pictures}
    return FolderReport(
        name=folder.name,
        pictures=len(read.pictures),
        repeats=folder.repeats,
        is_reg=folder.is_reg,
        class_name=folder.class_name,
        without_caption=sum(not entry.has_caption for entry in folder.entries if entry.path in usable),
        alone=folder.alone,
    )
