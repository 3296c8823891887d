"""Which pictures there are and what they show: folders in kohya's layout, and lists."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.core.opening import reason_of, shown
from lib_lora.errors import FileError, JobError, OutputError
from lib_lora.tools.images import SUFFIXES, Skipped
from lib_lora.train.data.captions import read_caption

if TYPE_CHECKING:
    from collections.abc import Set
    from pathlib import Path

    from lib_lora.train.data.options import DataOptions

_REPEATED = re.compile(r"(\d{1,6})(?:_(.*))?", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One picture of a folder.

    Attributes:
        path: Its file.
        caption: What it shows.
        has_caption: Whether it has a caption of its own, and not only the folder's name.
        network_multiplier: Strength of the network while it is learned.
    """

    path: Path
    caption: str
    has_caption: bool = True
    network_multiplier: float = 1.0


@dataclass(frozen=True)
class Folder:
    """Pictures that are used equally often.

    Attributes:
        name: Of the folder or the list.
        entries: Its pictures, by name.
        repeats: How often each is used in an epoch.
        class_name: What pictures without a caption show.
        is_reg: Whether they are regularisation pictures.
        alone: How many captions have no picture.
        skipped: What is in it and can not be used.
        is_list: Whether it is a list of captions.
    """

    name: str
    entries: tuple[Entry, ...]
    repeats: int = 1
    class_name: str = ""
    is_reg: bool = False
    alone: int = 0
    skipped: tuple[Skipped, ...] = ()
    is_list: bool = False


def read_folders(base: Path, options: DataOptions, *, is_reg: bool = False) -> tuple[list[Folder], list[str]]:
    """What is in `base`, and what should be known of it.

    If there are ``N_name`` folders, they are used and nothing else, as by kohya; if not, the pictures of `base` and of
    each folder inside it are used once in an epoch. What begins with a dot is left out.

    Raises:
        FileError: If a folder can not be read.
        JobError: If there is no picture.
    """
    repeats = {path: _repeats(path.name) for path in _places(base, options)} | {base: None}
    found = {path: read_folder(path, named or (1, ""), options, is_reg=is_reg) for path, named in repeats.items()}
    full = {path: folder for path, folder in found.items() if folder.entries or folder.skipped}
    if not full:
        alone = sum(folder.alone for folder in found.values())
        what = f"has {alone} captions, but no pictures" if alone else "has no pictures"
        raise JobError(
            f"{shown(base)} {what} ({', '.join(SUFFIXES)}); put them into a folder such as 10_name inside it"
        )
    numbered = [path for path in full if repeats[path]]
    used = {path: folder for path, folder in full.items() if folder.repeats and path in (numbered or full)}
    if not used:
        raise JobError(f"the folders of {shown(base)} ask for 0 repeats; put a number above 0 before their names")
    return list(used.values()), [_left_out(path, repeats[path]) for path in full if path not in used]


def read_folder(path: Path, named: tuple[int, str], options: DataOptions, *, is_reg: bool) -> Folder:
    """The pictures of one folder, not of those inside it.

    Args:
        path: The folder.
        named: How often they are used in an epoch, and what those without a caption show.
        options: Where captions are.
        is_reg: Whether they are regularisation pictures.

    Raises:
        FileError: If the folder can not be read.
    """
    repeats, class_name = named
    files = _listed(path)
    pictures = [file for file in files if _is_picture(file)]
    texts = {file.name for file in files if file.name.endswith(options.caption_extensions)}
    known = {picture.stem + extension for picture in pictures for extension in options.caption_extensions}
    found = [_entry(picture, texts, class_name, options) for picture in pictures]
    entries = tuple(one for one in found if isinstance(one, Entry))
    skipped = tuple(one for one in found if isinstance(one, Skipped))
    return Folder(path.name, entries, repeats, class_name, is_reg, len(texts - known), skipped)


def _left_out(path: Path, named: tuple[int, str] | None) -> str:
    if named:
        return f"{shown(path)} is left out: its name asks for 0 repeats"
    return f"the pictures in {shown(path)} are left out: it has no number of repeats before its name, others have"


def count_pictures(base: Path) -> int:
    """How many files look like pictures, in `base` and the folders inside it; 0 if it does not exist.

    Raises:
        FileError: If a folder can not be read.
    """
    if not base.exists():
        return 0
    folders = [path for path in _listed(base) if path.is_dir() and not path.name.startswith(".")]
    return sum(_is_picture(path) for folder in [base, *folders] for path in _listed(folder))


def make_folder(path: Path) -> None:
    """Make a folder, and those it is in, where they are missing.

    Raises:
        OutputError: If that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {shown(path)} can not be made: {reason_of(error)}") from error


def _places(base: Path, options: DataOptions) -> list[Path]:
    """The folders inside `base` that may have pictures of it."""
    others = {folder.resolve() for folder in (options.reg_data_dir, options.cache_dir) if folder is not None}
    folders = (path for path in _listed(base) if path.is_dir() and not path.name.startswith("."))
    return [path for path in folders if path.resolve() not in others]


def _repeats(name: str) -> tuple[int, str] | None:
    """How often the pictures of a folder are used, and what they show; None if its name does not say it."""
    found = _REPEATED.fullmatch(name)
    return (int(found[1]), found[2] or "") if found else None


def _entry(picture: Path, texts: Set[str], class_name: str, options: DataOptions) -> Entry | Skipped:
    names = (picture.stem + extension for extension in options.caption_extensions)
    text = next((name for name in names if name in texts), None)
    if text is None:
        return Entry(picture, class_name, has_caption=False)
    try:
        caption = read_caption(picture.with_name(text), all_lines=options.enable_wildcard)
    except (OSError, ValueError) as error:
        return Skipped(f"{picture.parent.name}/{picture.name}", reason_of(error))
    return Entry(picture, caption)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (OSError, ValueError) as error:
        raise FileError(f"the folder {shown(folder)} can not be read: {reason_of(error)}") from error
