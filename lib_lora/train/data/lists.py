"""Pictures and captions of one list: ``metadata.jsonl`` as of Hugging Face's data sets and kohya's, or kohya's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lib_lora.core.opening import reason_of, shown
from lib_lora.errors import FileError, JobError
from lib_lora.tools.images import SUFFIXES, Skipped
from lib_lora.train.data.folders import Entry, Folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lib_lora.train.data.options import DataOptions

_PATHS = ("file_name", "image_path", "image", "path")
_TEXTS = ("text", "caption", "prompt")
LARGEST_MULTIPLIER = 100.0
"""Strengths beyond are mistakes, and fp16 does not hold all of them."""


def read_list(path: Path, options: DataOptions) -> Folder:
    """The pictures of a list; what is missing is named and left out.

    A picture may have a ``network_multiplier``, kohya's word for the strength of the network while it is learned.

    Raises:
        FileError: If the list can not be read.
        JobError: If it is no list of pictures, or names none; if a multiplier is no number.
    """
    base = options.picture_folder
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    for name, facts in _named(path):
        picture = _found(base, name)
        if isinstance(picture, str):
            skipped.append(Skipped(name, picture))
        else:
            entries.append(_entry(picture, facts, options, _multiplier(facts, name, path)))
    if not entries and not skipped:
        raise JobError(f"{shown(path)} names no pictures")
    return Folder(path.name, tuple(entries), options.dataset_repeats, skipped=tuple(skipped), is_list=True)


def _named(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each picture's name and what is said of it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise FileError(f"{shown(path)} can not be read: {reason_of(error)}") from error
    if path.suffix.lower() != ".jsonl":
        for name, facts in _object(text, path, "").items():
            yield name, cast("dict[str, Any]", facts) if isinstance(facts, dict) else {}
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            facts = _object(line, path, f", line {number}")
            name = next((facts[key] for key in _PATHS if isinstance(facts.get(key), str)), None)
            if name is None:
                raise JobError(f"{shown(path)}, line {number}, names no picture; it needs {' or '.join(_PATHS)}")
            yield name, facts


def _object(text: str, path: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise JobError(f"{shown(path)}{where} is no JSON: {str(error)[:100]}") from error
    if not isinstance(found, dict):
        raise JobError(f'{shown(path)}{where} is no object of JSON, such as {{"file_name": …, "text": …}}')
    return cast("dict[str, Any]", found)


def _found(base: Path, name: str) -> Path | str:
    """The picture, or why there is none. kohya's lists may leave its suffix out."""
    try:
        path = base / name
        if ".." in Path(name).parts:
            return "it leads out of the folder of the pictures"
        paths = [path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)]
        return next((one for one in paths if one.is_file()), "there is no such file")
    except (OSError, ValueError) as error:
        return reason_of(error)


def _multiplier(facts: Mapping[str, Any], name: str, path: Path) -> float:
    """Strength of the network for a picture; 1 if nothing is said."""
    value = facts.get("network_multiplier")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_MULTIPLIER:
        given = json.dumps(value)[:100]
        raise JobError(
            f"{shown(path)}: the network_multiplier of {name} is {given}; it must be a number from "
            f"-{LARGEST_MULTIPLIER:g} to {LARGEST_MULTIPLIER:g}, such as 1"
        )
    return float(value)


def _entry(picture: Path, facts: Mapping[str, Any], options: DataOptions, multiplier: float) -> Entry:
    """The caption, or each line of it if one of them is chosen, and behind it the tags."""
    caption = next((facts[key] for key in _TEXTS if isinstance(facts.get(key), str)), "")
    between = f"{options.caption_separator} "
    tags = facts.get("tags") or ""
    if isinstance(tags, list):
        tags = between.join(map(str, cast("list[Any]", tags)))
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    used = lines if options.enable_wildcard else lines[:1]
    whole = "\n".join(between.join(filter(None, (line, str(tags).strip()))) for line in used)
    return Entry(picture, whole, has_caption=bool(whole), network_multiplier=multiplier)
