"""Files with block weight presets, in the format of LoRA Block Weight, whose own files can be dropped in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.core.files import FileIdentity
from lib_lora.core.opening import read_unchanged, shown
from lib_lora.errors import FileError
from lib_lora.prompt.block_weights import Presets
from lib_lora.prompt.preset_texts import ELEMENTS, WEIGHTS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from io import FileIO

    from lib_lora.prompt.preset_texts import PresetFormat

WEIGHTS_FILE = WEIGHTS.file_name
MOST_BYTES = 4 << 20


class PresetFiles:
    """The presets of some folders. Files are read again when they change; `PresetEditor` changes them.

    Attributes:
        folders: Where the files of `WEIGHTS` and `ELEMENTS` may lie; what a file does not say, a later one's or the
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
        forms = (WEIGHTS, ELEMENTS)
        identities = [identity_of(folder / form.file_name) for form in forms for folder in reversed(self.folders)]
        if identities != self._identities:
            found = [identity.path for identity in identities if identity is not None]
            faults: list[str] = []
            self._presets = Presets(*(_merged(form, found, faults) for form in forms))
            self._identities, self.notes = identities, tuple(faults)
        return self._presets


def identity_of(path: Path) -> FileIdentity | None:
    """Which content a file has, or None if there is none."""
    try:
        return FileIdentity.of(path)
    except FileError:
        return None


def read_preset_text(path: Path) -> str:
    """A small text file in UTF-8.

    Raises:
        FileError: If it is not that, or can not be read.
    """

    def read(file: FileIO) -> str:
        data = file.read(MOST_BYTES + 1) or b""
        if len(data) > MOST_BYTES:
            raise FileError(f"{shown(path)} has more than {MOST_BYTES >> 20} MB, which no file of presets has")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise FileError(f"{shown(path)} is not a text in UTF-8 (byte {error.start})") from error

    return read_unchanged(path, read)[1]


def _merged(form: PresetFormat, paths: Iterable[Path], faults: list[str]) -> dict[str, str]:
    """Presets of all files of one format, of which the later win; the others' faults are added to `faults`."""
    presets = {**form.shipped}
    for path in paths:
        if path.name == form.file_name:
            try:
                presets |= form.presets(read_preset_text(path))
            except FileError as error:
                faults.append(f"{error}; its presets are not known here")
    return presets
