"""What is known of LoRA files, kept across restarts."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.core.opening import shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lib_lora.core.opening import FileIdentity

LOCK_SECONDS = 1.0
DAMAGED_SUFFIX = ".damaged"

_CREATE = "CREATE TABLE IF NOT EXISTS lora_files_1 (path BLOB PRIMARY KEY, stamp TEXT, alias TEXT, data_hash TEXT)"
_READ = "SELECT path, stamp, alias, data_hash FROM lora_files_1"
_WRITE = "INSERT OR REPLACE INTO lora_files_1 VALUES (?, ?, ?, ?)"


@dataclass(frozen=True)
class FileFacts:
    """What was read from a file.

    Attributes:
        alias: ``ss_output_name``, or ``""``.
        data_hash: SHA-256 of its tensors in hex, or ``""`` while it is not known.
    """

    alias: str = ""
    data_hash: str = ""


class FileIndex:
    """Facts by (real path, size, time of the last write), in memory and in a SQLite file.

    A file that can not be used never stops anything: the facts are then kept in memory, and `notes` says why. Rows of
    lost files stay, for a disk may come back.

    Attributes:
        notes: What went wrong with the file.
    """

    def __init__(self, path: Path | None) -> None:
        self.notes: list[str] = []
        self._path = path
        self._known: dict[str, tuple[str, FileFacts]] = {}
        if path is not None:
            self._load(path)

    def get(self, real: str, identity: FileIdentity) -> FileFacts | None:
        """Facts of the content `identity` of the file `real`, or None."""
        stamp, facts = self._known.get(real, ("", None))
        return facts if stamp == _stamp(identity) else None

    def put(self, facts: Mapping[str, tuple[FileIdentity, FileFacts]]) -> None:
        """Keep facts by real path."""
        known = {real: (_stamp(identity), fact) for real, (identity, fact) in facts.items()}
        self._known.update(known)
        if self._path is None or not known:
            return
        rows = [(os.fsencode(real), stamp, fact.alias, fact.data_hash) for real, (stamp, fact) in known.items()]
        try:
            with closing(_connect(self._path)) as connection, connection:
                connection.executemany(_WRITE, rows)
        except sqlite3.Error as error:
            self._note(self._path, error)

    def _load(self, path: Path) -> None:
        try:
            self._known = _read(path)
        except sqlite3.OperationalError as error:  # locked, not writable, no such folder
            self._note(path, error)
        except sqlite3.DatabaseError as error:
            self._set_aside(path, error)

    def _set_aside(self, path: Path, error: sqlite3.Error) -> None:
        """Rename a damaged file, which may be somebody's that is no index at all, and start with an empty one."""
        try:
            path.replace(path.with_name(path.name + DAMAGED_SUFFIX))
            self._known = _read(path)
        except (OSError, sqlite3.Error):
            self._path = None
        self.notes.append(f"the index {shown(path)} was damaged ({error}) and is started afresh")

    def _note(self, path: Path, error: sqlite3.Error) -> None:
        if not self.notes:
            self.notes.append(
                f"the index {shown(path)} can not be used now ({error}), the next start will read all LoRA files again"
            )


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=LOCK_SECONDS)


def _read(path: Path) -> dict[str, tuple[str, FileFacts]]:
    with closing(_connect(path)) as connection, connection:
        connection.execute(_CREATE)
        return {
            os.fsdecode(real): (str(stamp), FileFacts(str(alias), str(data_hash)))
            for real, stamp, alias, data_hash in connection.execute(_READ)
        }


def _stamp(identity: FileIdentity) -> str:
    # A text, for SQLite's integers end in the year 2262 when they count nanoseconds.
    return f"{identity.size}:{identity.mtime_ns}"
