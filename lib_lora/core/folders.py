"""Which LoRA files lie below a folder. Only names and sizes are looked at, nothing is opened."""

from __future__ import annotations

import os
import re
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.opening import FileIdentity
from lib_lora.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator

LORA_SUFFIXES = frozenset({".safetensors", ".sft", ".pt", ".ckpt", ".bin"})
"""Pickles are listed too: reading one tells that it must be converted first."""


class LoraPlace(NamedTuple):
    """Where a folder shows a file: the file itself, or a link to it.

    Attributes:
        path: The place.
        real: The file, all links resolved.
        is_link: If the place itself is a link.
        identity: Which content is there.
        name: File name without suffix.
        sub_path: Path below the folder without suffix, with ``/``.
        long_path: The same with the folder's own name before it.
    """

    path: Path
    real: str
    is_link: bool
    identity: FileIdentity
    name: str
    sub_path: str
    long_path: str


def lora_places(folder: Path) -> list[LoraPlace]:
    """Every LoRA file below `folder`, links followed, in the order in which the WebUI walks.

    Folders are walked once, so loops of links end. Hidden files are left out, and with them temporary ones; so is what
    is not a regular file or can not be looked at. A folder that does not exist holds nothing.

    Source of the order: modules/util.py of the WebUI 1.10.1.
    """
    places = [place for directory, items in _directories(folder) for place in _places_in(folder, directory, items)]
    return sorted(places, key=_walk_order)


def _directories(folder: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """`folder` and all below it with what is in them: each once, those behind links last."""
    seen: set[tuple[int, int]] = set()
    owned, linked = deque([folder]), deque[Path]()
    while owned or linked:
        directory = (owned or linked).popleft()
        try:
            status = directory.stat()
            with os.scandir(directory) as listing:
                items = list(listing)
        except OSError:  # not there, or not for us
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for item in filter(_is_folder, items):
            (linked if item.is_symlink() else owned).append(Path(item.path))
        yield directory, items


def _is_folder(item: os.DirEntry[str]) -> bool:
    # os.path.isdir swallows what a link to itself raises.
    return item.is_dir(follow_symlinks=False) or (item.is_symlink() and os.path.isdir(item.path))  # noqa: PTH112


def _places_in(folder: Path, directory: Path, items: list[os.DirEntry[str]]) -> Iterator[LoraPlace]:
    real_directory = os.path.realpath(directory)
    below = directory.relative_to(folder)
    for file in items:
        name, suffix = os.path.splitext(file.name)  # noqa: PTH122 -- ten thousand of them
        if suffix.lower() not in LORA_SUFFIXES or name.startswith("."):
            continue
        try:
            identity = FileIdentity.of(file.path)
        except FileError:  # a dangling link, a pipe, a folder
            continue
        is_link = file.is_symlink()
        real = os.path.realpath(file.path) if is_link else os.path.join(real_directory, file.name)  # noqa: PTH118
        sub_path = (below / name).as_posix()
        yield LoraPlace(identity.path, real, is_link, identity, name, sub_path, f"{folder.name}/{sub_path}")


def _walk_order(place: LoraPlace) -> tuple[list[str | int], list[str | int], str]:
    return _natural(str(place.path.parent)), _natural(place.path.name), str(place.path)


def _natural(text: str) -> list[str | int]:
    """Letters and numbers by turns, so that ``a10`` comes after ``a9``."""
    return [int(part) if turn % 2 else part.lower() for turn, part in enumerate(re.split("([0-9]+)", text))]
