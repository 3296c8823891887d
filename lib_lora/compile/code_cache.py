"""The folder where torch keeps what it compiled: what is damaged there is compiled again.

torch knows these files by their names alone: it calls what a text that was cut off still says, and a library that was
cut off ends the program that loads it. So a list of SHA-256 is kept beside them, and what is not as the list says, for
the disk failed or a compiler was killed, is removed before torch looks.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lib_lora.core.saving import check_writable, remove_file, save_bytes
from lib_lora.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TRITON_VARIABLE = "TRITON_CACHE_DIR"
LIST = "prefuse.json"
PREFIX = "prefuse-"

logger = logging.getLogger(__name__)


class CodeCache:
    """The folder that torch uses in this program."""

    def __init__(self, folder: Path | None) -> None:
        """Have torch use a folder, in which whole files are left alone, unless the user chose another one.

        Args:
            folder: Where compiled code survives a restart; None for torch's own, a temporary one. It is not used if it
                can not be written to.
        """
        self._folder = folder
        self._digests: dict[str, tuple[int, int, str]] = {}
        self._is_suspect = self._was_suspect = False
        if folder is None or not _is_temporary(os.environ.get(VARIABLE)):
            return
        try:
            _prepare(folder)
        except (OSError, OutputError) as error:
            logger.warning("compiled code is not kept until the next start: %s", error)
        else:
            _use(str(folder))

    def suspect(self) -> bool:
        """Something went wrong: compile in an empty folder from now on; False if that is so already."""
        self._is_suspect = not self._was_suspect
        self._was_suspect = True
        return self._is_suspect

    def open(self) -> None:
        """To be called before something is compiled, in the thread that compiles.

        Raises:
            OSError: If there is no room for an empty folder.
        """
        if not self._is_suspect:
            return
        self._is_suspect = False
        old, new = os.environ.get(VARIABLE), tempfile.mkdtemp(prefix=PREFIX)
        atexit.register(shutil.rmtree, new, ignore_errors=True)
        if old and os.environ.get(TRITON_VARIABLE, "").startswith(old):
            del os.environ[TRITON_VARIABLE]  # torch derived it from the other
        _use(new)
        _forget_loaded()

    def keep(self) -> None:
        """To be called when something was compiled and works: the next program may use the files that are there."""
        if self._folder is None or os.environ.get(VARIABLE) != str(self._folder):
            return
        try:
            self._digests = dict(self._listed(self._folder))
            listed = {name: digest for name, (_, _, digest) in self._digests.items()}
            save_bytes(self._folder / LIST, json.dumps(listed).encode(), overwrite=True)
        except (OSError, OutputError) as error:
            logger.warning("compiled code is not kept until the next start: %s", error)

    def _listed(self, folder: Path) -> Iterator[tuple[str, tuple[int, int, str]]]:
        """Name → size, time and digest; what did not change is not read again."""
        for name, path in _files(folder):
            state = path.stat()
            known = self._digests.get(name)
            if known is None or known[:2] != (state.st_size, state.st_mtime_ns):
                known = state.st_size, state.st_mtime_ns, _digest(path)
            yield name, known


def _prepare(folder: Path) -> None:
    """Make a folder, or leave of it what is as listed.

    Raises:
        OSError, OutputError: If it can not be read and written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder)
    listed = _read_list(folder / LIST)
    for name, path in _files(folder):
        if listed.get(name) != _digest(path):
            remove_file(path)


def _read_list(path: Path) -> dict[str, str]:
    """What is not a list lists nothing."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, str]", content) if isinstance(content, dict) else {}


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name in the folder, path; but for the list and for locks, which other programs may hold."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != LIST and path.suffix != ".lock":
            yield name, path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _forget_loaded() -> None:
    """Have torch look at files again, also at those of which it has loaded something."""
    from torch._inductor import codecache, utils

    if clear := getattr(utils, "clear_caches", None):
        clear()
        return
    old = cast("Any", codecache)  # torch before 2.3
    for clear in (old.CppCodeCache.clear, old.PyCodeCache.clear, old.cpp_prefix_path.cache_clear):
        clear()


def _use(folder: str) -> None:
    os.environ[VARIABLE] = folder
    from torch._inductor import codecache

    if clear := getattr(cast("Any", codecache).cache_dir, "cache_clear", None):
        clear()  # torch before 2.3 reads the variable once


def _is_temporary(folder: str | None) -> bool:
    """Whether nobody chose it: torch writes its own choice into the variable when it is first asked."""
    return folder is None or Path(folder).parent == Path(tempfile.gettempdir())
