"""One at a time, of all processes that edit small files of a folder."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lib_lora.core.opening import reason_of, shown
from lib_lora.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

WAIT_SECONDS = 10.0
"""An edit takes milliseconds."""
PAUSE_SECONDS = 0.01
LOCK_NAME = ".tmp-prefuse-lock"


@contextmanager
def editing(
    folder: Path, others: str = "another program edits the files of", wait: float | None = None
) -> Generator[None]:
    """Nobody else is in such a block for `folder` meanwhile; the system ends it when the process is killed.

    Args:
        folder: Is there.
        others: What somebody else in such a block does, for the message.
        wait: Seconds for them to leave it; by default `WAIT_SECONDS`.

    Raises:
        OutputError: If somebody else does not leave it, or there is no such folder.
    """
    deadline = time.monotonic() + (WAIT_SECONDS if wait is None else wait)
    try:
        while (lock := _taken(folder)) is None:
            if time.monotonic() > deadline:
                raise OutputError(f"{others} the folder {shown(folder)}; try again later")
            time.sleep(PAUSE_SECONDS)
    except (OSError, ValueError) as error:
        raise OutputError(f"the folder {shown(folder)} can not be opened: {reason_of(error)}") from error
    try:
        yield
    finally:
        os.close(lock)


if sys.platform == "win32":

    def _taken(folder: Path) -> int | None:
        """Windows opens no folders, but removes such a file when the one that made it ends."""
        try:
            return os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        except (FileExistsError, PermissionError):  # somebody has it, or just ended
            return None

else:
    import fcntl

    def _taken(folder: Path) -> int | None:
        """A descriptor of the folder that nobody else locks, or None if somebody does."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # some network file systems have no locks; who edits looks at the file once more anyway
            return descriptor
        return descriptor
