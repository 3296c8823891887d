"""Reading a path that may be anything, and a file that may change meanwhile."""

from __future__ import annotations

import mmap
import os
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from lib_lora.core.header import (
    HEAD_BYTES,
    LENGTH_BYTES,
    MEGABYTE,
    Header,
    HeaderLimits,
    TensorInfo,
    header_length,
    parse_header,
)
from lib_lora.errors import FileChangedError, FileError, IncompleteFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor

T = TypeVar("T")

READ_ATTEMPTS = 5
# Two writes within one tick of the file system's clock leave one time. Kernels tick in up to 16 ms, FAT in 2 s.
CLOCK_TICK_NS = 20_000_000
COARSE_CLOCK_TICK_NS = 2_000_000_000


@dataclass(frozen=True)
class FileIdentity:
    """Which content of which file: another inode, size or time means another content.

    Attributes:
        path: Where it was found.
        size: Bytes.
        mtime_ns: Time of the last write in nanoseconds.
        inode: Number of the file on its disk.
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileIdentity:
        """Identity of the regular file that is at `path` now.

        Raises:
            FileError: If there is none.
        """
        return cls.from_stat(Path(path), regular_stat(Path(path)))

    @classmethod
    def from_stat(cls, path: Path, status: os.stat_result) -> FileIdentity:
        """Identity of a file whose status is known."""
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)


def shown(path: str | os.PathLike[str]) -> str:
    """The file's name as a sentence can hold it: control characters and broken Unicode replaced."""
    name = Path(path).name or str(path)
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def reason_of(error: Exception) -> str:
    """What the system says about a failed file operation, without the path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def regular_stat(path: Path) -> os.stat_result:
    """Status of a regular file, links followed.

    Raises:
        FileError: If there is none at `path`, or a folder, device or pipe.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise FileError(f"{shown(path)} can not be opened: {reason_of(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
        raise FileError(f"{shown(path)} is {kind}, not a file")
    return status


def read_unchanged(path: Path, read: Callable[[FileIO], T]) -> tuple[FileIdentity, T]:
    """What `read` makes of a file that nobody writes to meanwhile, and that content's identity.

    Args:
        path: The file.
        read: Gets the file, open and unbuffered, and may be called again when the file changed.

    Raises:
        FileChangedError: If the file changed during each of `READ_ATTEMPTS` attempts.
        FileError: If it is not a regular file or can not be read; or what `read` raises.
    """
    for _ in range(READ_ATTEMPTS):
        with _open_regular(path) as file:
            before = os.fstat(file.fileno())
            if pause := _seconds_until_settled(before):
                time.sleep(pause)
                continue
            try:
                result = read(file)
            except FileError:
                if _stamp(file) == _content_stamp(before):
                    raise
                continue  # half of one content and half of another can have any fault
            if _stamp(file) == _content_stamp(before):
                return FileIdentity.from_stat(path, before), result
    raise FileChangedError(f"{shown(path)} is being written to; try again when that is done")


def checked_header(file: FileIO, limits: HeaderLimits, path: Path) -> Header:
    """The header of an open file.

    Raises:
        FileError: As `header_length` and `parse_header`, or if the file ends early.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = header_length(file.read(HEAD_BYTES), size, limits, shown(path))
    file.seek(LENGTH_BYTES)
    raw = file.read(length)
    if len(raw) < length:
        raise IncompleteFileError(f"{shown(path)} became shorter while it was read; try again")
    return parse_header(raw, size, limits, shown(path))


def read_data(file: FileIO, header: Header, path: Path) -> Tensor:
    """The tensors' bytes as one uint8 tensor in memory.

    Raises:
        FileError: If memory is short or the file ends early.
    """
    size = header.file_size - header.data_start
    try:
        data = torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:  # how torch says that memory is short
        raise FileError(f"{shown(path)} does not fit in memory, it needs {size / MEGABYTE:,.1f} MB") from error
    file.seek(header.data_start)
    rest = data.numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise IncompleteFileError(f"{shown(path)} became shorter while it was read; try again")
        rest = rest[count:]
    return data


def map_file(file: FileIO, header: Header, path: Path) -> mmap.mmap:
    """A private map of the whole file: what is written to it stays in this process.

    Raises:
        FileError: If the system refuses the map.
    """
    try:
        return mmap.mmap(file.fileno(), header.file_size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise FileError(f"{shown(path)} can not be mapped into memory: {reason_of(error)}") from error


def tensor_view(data: Tensor, info: TensorInfo) -> Tensor:
    """One tensor, a view of the file's bytes; a copy if the file did not align it."""
    raw = data[info.begin : info.end]
    if raw.storage_offset() % info.dtype.itemsize:  # torch has no unaligned views
        raw = raw.clone()
    return raw.view(info.dtype).view(info.shape)


def _stamp(file: FileIO) -> tuple[int, int, int]:
    return _content_stamp(os.fstat(file.fileno()))


def _content_stamp(status: os.stat_result) -> tuple[int, int, int]:
    # The change time too: copying tools set the modification time back.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _seconds_until_settled(status: os.stat_result) -> float:
    """How long until a further write is sure to change the file's times; 0 if it is already."""
    times = (status.st_mtime_ns, status.st_ctime_ns)
    tick = CLOCK_TICK_NS if any(moment % 1_000_000_000 for moment in times) else COARSE_CLOCK_TICK_NS
    ages = [time.time_ns() - moment for moment in times]
    return max((tick - age for age in ages if 0 <= age < tick), default=0) / 1e9


@contextmanager
def _open_regular(path: Path) -> Generator[FileIO]:
    """A regular file, open for reading. What would block or answer for ever, such as a pipe, is not opened."""
    regular_stat(path)
    try:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        with FileIO(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileError(f"{shown(path)} is not a file any more")
            yield file
    except OSError as error:
        raise FileError(f"{shown(path)} can not be read: {reason_of(error)}") from error
