"""A training set: its pictures, each with its size and caption, before one of them is encoded."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.saving import no_progress
from lib_lora.errors import JobError
from lib_lora.tools.images import Skipped
from lib_lora.train.data.buckets import Buckets
from lib_lora.train.data.folders import read_folders
from lib_lora.train.data.lists import read_list
from lib_lora.train.data.measuring import Measurements
from lib_lora.train.data.order import Order
from lib_lora.train.data.pictures import Picture
from lib_lora.train.data.prefetch import prefetched
from lib_lora.train.data.report import BucketReport, DataReport, FolderReport

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from lib_lora.core.saving import Progress
    from lib_lora.train.data.buckets import Fit, Size
    from lib_lora.train.data.folders import Folder
    from lib_lora.train.data.measuring import Measured
    from lib_lora.train.data.options import DataOptions

READERS = 8
"""Pictures read at once at most: each takes its pixels' memory."""


@dataclass(frozen=True)
class Dataset:
    """Pictures to train on.

    Attributes:
        options: How they are used.
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

    def order(self, processes: int = 1) -> Order:
        """Which pictures are in which batch."""
        options = self.options
        return Order(list(self.buckets().values()), options.train_batch_size * processes, options.seed)


class _Usable(NamedTuple):
    """A picture that can be used."""

    measured: Measured
    fit: Fit


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
    folders, notes = _folders(options)
    files = list(dict.fromkeys(entry.path for folder in folders for entry in folder.entries))
    found = dict(zip(files, _looked_at(files, options, progress), strict=True))
    pictures = [one for folder in folders for one in _pictures(folder, found, options.picture_folder)]
    skipped = [file for folder in folders for file in (*folder.skipped, *_skipped(folder, found))]
    if all(picture.is_reg for picture in pictures):
        reason = f": {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise JobError(f"none of the {len(files)} pictures can be trained on{reason}")
    wanted, named = _counts(pictures)
    notes += [f"only {wanted} of {named} regularisation pictures are used, as many as others"] if named > wanted else []
    matched = _matched(pictures, wanted)
    notes += _note_of_strengths(matched)
    report = DataReport(
        folders=tuple(_told(folder, found) for folder in folders),
        buckets=tuple(BucketReport(size, len(indices)) for size, indices in _buckets(matched).items()),
        ratio_error=sum(map(_ratio_error, matched)) / len(matched),
        train_images=wanted,
        reg_images=named,
        skipped=tuple(skipped),
        notes=tuple(notes),
    )
    return Dataset(options, tuple(folders), matched, report)


def _folders(options: DataOptions) -> tuple[list[Folder], list[str]]:
    """For training first; and what should be known of them."""
    if options.in_json is not None:
        folders, notes = [read_list(options.in_json, options)], list[str]()
    else:
        folders, notes = read_folders(options.picture_folder, options)
    if options.reg_data_dir is not None:
        reg, more = read_folders(options.reg_data_dir, options, is_reg=True)
        folders, notes = folders + reg, notes + more
    return folders, notes


def _looked_at(files: Sequence[Path], options: DataOptions, progress: Progress) -> Iterator[_Usable | str]:
    """For each file its size and bucket, or why it can not be used."""
    buckets = Buckets.of(options)
    measurements = Measurements(options.cache_folder if options.makes_files else None)

    def look(path: Path) -> _Usable | str:
        try:
            measured = measurements.measure(path)
            return _Usable(measured, buckets.fit(measured.size))
        except ValueError as error:
            return str(error)

    for done, found in enumerate(prefetched(look, files, min(READERS, os.cpu_count() or 1)), 1):
        progress(done, len(files))
        yield found
    measurements.keep()


def _pictures(folder: Folder, found: Mapping[Path, _Usable | str], base: Path) -> Iterator[Picture]:
    for entry in folder.entries:
        if not isinstance(usable := found[entry.path], str):
            (size, identity), fit = usable
            name = _name(folder, entry.path, base)
            strength = entry.network_multiplier
            yield Picture(name, entry.path, identity, size, fit, entry.caption, folder.repeats, folder.is_reg, strength)


def _skipped(folder: Folder, found: Mapping[Path, _Usable | str]) -> Iterator[Skipped]:
    for entry in folder.entries:
        if isinstance(reason := found[entry.path], str):
            yield Skipped(f"{folder.name}/{entry.path.name}", reason)


def _name(folder: Folder, path: Path, base: Path) -> str:
    """What tells a picture from all others of the set, wherever the set lies."""
    if folder.is_list:
        return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()
    return f"{'reg/' if folder.is_reg else ''}{folder.name}/{path.name}"


def _note_of_strengths(pictures: Iterable[Picture]) -> list[str]:
    strengths = [one.network_multiplier for one in pictures if one.network_multiplier != 1]
    what = f"{len(strengths)} pictures are learned with the network at another strength than 1"
    return [f"{what}: {min(strengths):g} to {max(strengths):g}"] if strengths else []


def _counts(pictures: Iterable[Picture]) -> tuple[int, int]:
    """Pictures of an epoch, and regularisation pictures as their folders say."""
    counts = {True: 0, False: 0}
    for picture in pictures:
        counts[picture.is_reg] += picture.repeats
    return counts[False], counts[True]


def _matched(pictures: Sequence[Picture], wanted: int) -> tuple[Picture, ...]:
    """As many regularisation pictures as others: the first ones of them, or all, and some of them once more.

    Source: DreamBoothDataset of kohya's sd-scripts (library/train_util.py).
    """
    train = [picture for picture in pictures if not picture.is_reg]
    used: list[Picture] = []
    count = 0
    for picture in pictures:
        if picture.is_reg and count < wanted:
            used.append(picture)
            count += picture.repeats
    rounds, rest = divmod(max(0, wanted - count), len(used) or 1)
    more = (replace(picture, repeats=picture.repeats + rounds + (i < rest)) for i, picture in enumerate(used))
    return (*train, *more)


def _buckets(pictures: Iterable[Picture]) -> dict[Size, list[int]]:
    found: defaultdict[Size, list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        found[picture.fit.bucket] += [index] * picture.repeats
    return dict(sorted(found.items()))


def _ratio_error(picture: Picture) -> float:
    (width, height), (wide, high) = picture.size, picture.fit.bucket
    return abs(wide / high - width / height)


def _told(folder: Folder, found: Mapping[Path, _Usable | str]) -> FolderReport:
    usable = [entry for entry in folder.entries if not isinstance(found[entry.path], str)]
    return FolderReport(
        name=folder.name,
        pictures=len(usable),
        repeats=folder.repeats,
        is_reg=folder.is_reg,
        class_name=folder.class_name,
        without_caption=sum(not entry.has_caption for entry in usable),
        alone=folder.alone,
    )
