"""Replacing a file by another one, or making a folder: wholly or not at all, whatever happens on the way."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import chain, count
from typing import TYPE_CHECKING

from lib_lora.core.header import MEGABYTE
from lib_lora.core.large_writes import LargeWriter, write_all
from lib_lora.core.opening import reason_of, shown
from lib_lora.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

STALE_SECONDS = 24 * 3600
TEMP_PREFIX = ".tmp-"
LARGE_BYTES = 64 << 20
"""From this size on, a file is written past the page cache."""


class TempFile:
    """A new file with a name of its own in the folder of a file to be replaced.

    Made by `open` with mode 0666, so that the umask and the folder decide on the permissions, as for any new file.
    """

    def __init__(self, folder: Path, size: int = 0) -> None:
        self._path = temporary_path(folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self.file = FileIO(os.open(self._path, flags, 0o666), "r+")
        self._large = LargeWriter(self.file) if size >= LARGE_BYTES else None

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`.

        Raises:
            OSError: If the disk is full or a limit is reached.
        """
        if self._large is None:
            write_all(self.file, data)
        else:
            self._large.write(data)

    def end(self) -> None:
        """All of it is in the file, which can be read from now on.

        Raises:
            OSError: As `write`.
        """
        if self._large is not None:
            self._large.close()
            self._large = None

    def publish(self, path: Path) -> None:
        """Rename to `path`, when the bytes are on the disk."""
        self.end()
        os.fsync(self.file.fileno())
        self.file.close()
        self._path.replace(path)
        _sync_folder(path.parent)

    def discard(self) -> None:
        """Close and remove it, published or not."""
        if self._large is not None:
            self._large.abandon()
        self.file.close()
        self._path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, size: int, overwrite: bool) -> Generator[TempFile]:
    """A temporary file that becomes `path` if the block ends well, and is removed if not.

    Args:
        path: The file to be. What is there stays untouched until the new file is whole and on the disk.
        size: Bytes that will be written.
        overwrite: Whether an older file is replaced.

    Raises:
        OutputError: If `path` exists and `overwrite` is not set, is a link or no file, or can not be written.
    """
    try:
        check_target(path, overwrite)
        _remove_stale_temps(path.parent)
        if shutil.disk_usage(path.parent).free < size:
            raise OutputError(f"{shown(path)} was not saved: it needs {size / MEGABYTE:,.1f} MB, the disk is full")
        temp = TempFile(path.parent, size)
        try:
            yield temp
            check_target(path, overwrite)  # it may have come into being meanwhile
            temp.publish(path)
        except BaseException:
            temp.discard()
            raise
    except (OSError, ValueError) as error:
        raise OutputError(f"{shown(path)} was not saved: {reason_of(error)}") from error


@contextmanager
def making_file(path: Path, size: int, overwrite: bool) -> Generator[Path]:
    """A path for a library that writes files itself; what is there becomes `path` if the block ends well.

    Args:
        path: The file to be; the library is given the same name in a temporary folder beside it.
        size: Bytes that will be written, about.
        overwrite: Whether an older file is replaced.

    Raises:
        OutputError: As `replacing`.
    """
    try:
        check_target(path, overwrite)
        _remove_stale_temps(path.parent)
        if shutil.disk_usage(path.parent).free < size:
            raise OutputError(f"{shown(path)} was not saved: it needs {size / MEGABYTE:,.1f} MB, the disk is full")
        folder = temporary_path(path.parent)
        folder.mkdir()
        try:
            yield folder / path.name
            check_target(path, overwrite)  # it may have come into being meanwhile
            with (folder / path.name).open("rb+") as file:
                os.fsync(file.fileno())
            (folder / path.name).replace(path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"{shown(path)} was not saved: {reason_of(error)}") from error


@contextmanager
def making_folder(path: Path) -> Generator[Path]:
    """A temporary folder that becomes `path` if the block ends well, and is removed with all in it if not.

    Raises:
        OutputError: If there is something at `path`, or it can not be written.
    """
    try:
        check_target(path, overwrite=False)
        _remove_stale_temps(path.parent)
        temp = temporary_path(path.parent)
        temp.mkdir()
        try:
            yield temp
            check_target(path, overwrite=False)  # it may have come into being meanwhile
            temp.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
    except (OSError, ValueError) as error:
        raise OutputError(f"{shown(path)} was not saved: {reason_of(error)}") from error


def set_aside(path: Path) -> Path:
    """Rename a file to its name and ``.bak``, ``.bak2`` and so on: the first that is free.

    Raises:
        OSError: If the system refuses that.
    """
    names = (path.with_name(f"{path.name}.bak{number or ''}") for number in chain([0], count(2)))
    kept = next(name for name in names if not os.path.lexists(name))
    os.close(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL))  # from here on nobody else takes the name
    return path.replace(kept)


@contextmanager
def scratch_file(folder: Path) -> Generator[Path]:
    """A name for a file in `folder` that is removed when the block ends."""
    path = temporary_path(folder)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def temporary_path(folder: Path) -> Path:
    """A name that nothing in `folder` has; what is left there under such names is removed after a day."""
    return folder / f"{TEMP_PREFIX}{secrets.token_hex(8)}"


def check_target(path: Path, overwrite: bool) -> None:
    """Whether a file may be written at `path`.

    Raises:
        OutputError: If it exists and `overwrite` is not set, is a link or no file, or nobody may look.
    """
    try:
        there = path.exists()
        is_strange = path.is_symlink() or (there and not path.is_file())
    except OSError as error:
        raise OutputError(f"{shown(path)} can not be written: {reason_of(error)}") from error
    if is_strange:
        raise OutputError(f"{shown(path)} is a link, a folder or a device and is not replaced; choose another name")
    if there and not overwrite:
        raise OutputError(f"{shown(path)} exists already; choose another name, or allow to overwrite it")


def _remove_stale_temps(folder: Path) -> None:
    """Remove what killed processes left; younger ones may be in use."""
    for temp in folder.glob(f"{TEMP_PREFIX}{'[0-9a-f]' * 16}"):
        with suppress(OSError):  # another process may be at the same
            if time.time() - temp.lstat().st_mtime > STALE_SECONDS:
                shutil.rmtree(temp) if temp.is_dir() and not temp.is_symlink() else temp.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename outlive a power cut, where the file system can."""
    if os.name == "nt":  # Windows can not open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # network file systems refuse; the file itself is safe
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
