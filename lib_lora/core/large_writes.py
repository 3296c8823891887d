"""Appending gigabytes to a file: past the system's page cache where that can be, and in a thread of its own."""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import FileIO

BLOCK_BYTES = 16 << 20
"""A multiple of every disk's sectors."""
_DIRECT = getattr(os, "O_DIRECT", 0)


class LargeWriter:
    """Collects what is appended in two blocks; one is filled while the other one is written.

    Bytes that are copied to the page cache first cost more time of the processor than the disk takes for them, and
    push out what others read.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._block, self._other = mmap.mmap(-1, BLOCK_BYTES), mmap.mmap(-1, BLOCK_BYTES)
        self._filled = 0
        self._thread = ThreadPoolExecutor(1, "prefuse-writer")
        self._writing: Future[None] | None = None
        bypass_cache(file, wanted=True)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`; it is copied, and may be overwritten afterwards.

        Raises:
            OSError: If the disk is full or a limit is reached; also by a later call, or by `close`.
        """
        rest = memoryview(data)
        while rest:
            taken = min(len(rest), BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == BLOCK_BYTES:
                self._wait()
                self._writing = self._thread.submit(write_all, self._file, memoryview(self._block))
                self._block, self._other, self._filled = self._other, self._block, 0

    def close(self) -> None:
        """Write what is left; the file can be read then.

        Raises:
            OSError: As `write`.
        """
        try:
            self._wait()
            bypass_cache(self._file, wanted=False)  # the last bytes are no whole block
            write_all(self._file, memoryview(self._block)[: self._filled])
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Write no more; returns when the thread has ended."""
        self._filled = 0
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Append all of `data`.

    Raises:
        OSError: If the disk is full or a limit is reached.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[_write_some(file, rest) :]


def _write_some(file: FileIO, data: memoryview) -> int:
    """How many of the bytes were written."""
    try:
        return file.write(data)
    except OSError as error:
        # Some file systems take whole sectors only, and others refuse what they had agreed to.
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP) and bypass_cache(file, wanted=False):
            return file.write(data)
        raise


def bypass_cache(file: FileIO, *, wanted: bool) -> bool:
    """Whether it could be changed that what is written goes to the disk at once."""
    if not _DIRECT:  # an extension of Linux
        return False
    import fcntl

    descriptor = file.fileno()
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    changed = flags | _DIRECT if wanted else flags & ~_DIRECT
    with suppress(OSError):  # some file systems have nothing but a cache
        fcntl.fcntl(descriptor, fcntl.F_SETFL, changed)
        return changed != flags
    return False
