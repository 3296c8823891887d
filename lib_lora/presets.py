"""Files with block weight presets, in the format of LoRA Block Weight, whose own files can be dropped in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.core.files import FileIdentity
from lib_lora.core.opening import read_unchanged, shown
from lib_lora.errors import FileError
from lib_lora.prompt.block_weights import (
    SHIPPED_ELEMENTS,
    SHIPPED_WEIGHTS,
    Presets,
    read_element_presets,
    read_weight_presets,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable
    from io import FileIO

WEIGHTS_FILE = "lbwpresets.txt"
ELEMENTS_FILE = "elempresets.txt"
MOST_BYTES = 4 << 20


class PresetFiles:
    """The presets of some folders. Files are read again when they change.

    Attributes:
        folders: Where `WEIGHTS_FILE` and `ELEMENTS_FILE` may lie; what a file does not say, a later one's or the
            shipped presets do.
        notes: Which file can not be read, and why.
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]] = ()) -> None:
        self.folders = tuple(map(Path, folders))
        self.notes: tuple[str, ...] = ()
        self._identities: list[FileIdentity | None] | None = None
        self._presets = Presets()

    def read(self) -> Presets:
        """All presets, as the files are now."""
        names = (WEIGHTS_FILE, ELEMENTS_FILE)
        identities = [_identity(folder / name) for name in names for folder in reversed(self.folders)]
        if identities != self._identities:
            found = [identity.path for identity in identities if identity is not None]
            faults: list[str] = []
            weights = _merged(WEIGHTS_FILE, found, read_weight_presets, faults)
            elements = _merged(ELEMENTS_FILE, found, read_element_presets, faults)
            self._presets = Presets({**SHIPPED_WEIGHTS, **weights}, {**SHIPPED_ELEMENTS, **elements})
            self._identities, self.notes = identities, tuple(faults)
        return self._presets


def _merged(
    name: str, paths: Iterable[Path], read: Callable[[str], dict[str, str]], faults: list[str]
) -> dict[str, str]:
    """Presets of all files of one name, of which the later win; the others' faults are added to `faults`."""
    presets: dict[str, str] = {}
    for path in paths:
        if path.name == name:
            try:
                presets |= read(_read_text(path))
            except FileError as error:
                faults.append(f"{error}; its presets are not known here")
    return presets


def _identity(path: Path) -> FileIdentity | None:
    try:
        return FileIdentity.of(path)
    except FileError:
        return None


def _read_text(path: Path) -> str:
    """A small text file in UTF-8.

    Raises:
        FileError: If it is not that, or can not be read.
    """

    def read(file: FileIO) -> str:
        data = file.read(MOST_BYTES + 1) or b""
        if len(data) > MOST_BYTES:
            raise FileError(f"{shown(path)} has more than {MOST_BYTES >> 20} MB, which no file of presets has")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise FileError(f"{shown(path)} is not a text in UTF-8 (byte {error.start})") from error

    return read_unchanged(path, read)[1]
