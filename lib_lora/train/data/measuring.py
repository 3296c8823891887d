"""Reading each picture once before the training, and knowing the next time which were whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lib_lora.core.opening import FileIdentity
from lib_lora.core.saving import save_bytes
from lib_lora.errors import FileError
from lib_lora.tools.pictures import UNREADABLE, open_picture, why_unreadable
from lib_lora.train.data.buckets import Size
from lib_lora.train.data.folders import make_folder

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "pictures.json"


class Measured(NamedTuple):
    """What was found at a path.

    Attributes:
        size: Upright.
        identity: Of the content.
    """

    size: Size
    identity: FileIdentity


class Measurements:
    """Sizes of pictures that are whole; those of an earlier training are believed while the files are the same."""

    def __init__(self, folder: Path | None) -> None:
        """Known from one training to the next by a file in `folder`; None to forget them."""
        self._index = None if folder is None else folder / INDEX
        self._known = {} if self._index is None else _read(self._index)
        self._used: dict[str, list[int]] = {}

    def measure(self, path: Path) -> Measured:
        """Read a picture whole, so that damage is found before the training and not in the middle of it.

        Raises:
            ValueError: If it can not be read; with the reason.
        """
        try:
            identity = FileIdentity.of(path)
            content = [identity.size, identity.mtime_ns]
            known = self._known.get(str(path), [])
            size = Size(*known[2:] if known[:2] == content else open_picture(path).size)
        except (*UNREADABLE, FileError) as error:
            raise ValueError(why_unreadable(error)) from error
        self._used[str(path)] = [*content, *size]
        return Measured(size, identity)

    def keep(self) -> None:
        """Write what was measured, if that is wanted and there is something new.

        Raises:
            OutputError: If the file can not be written.
        """
        if self._index is None or self._used == self._known:
            return
        make_folder(self._index.parent)
        save_bytes(self._index, json.dumps(self._used).encode(), overwrite=True)


def _read(index: Path) -> dict[str, list[int]]:
    """What can be understood of an index; {} if there is none."""
    try:
        found = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    return {path: entry for path, entry in entries.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(number) for number in cast("list[Any]", entry)] == [int] * 4
