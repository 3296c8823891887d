"""Pickles of PyTorch (.pt, .ckpt, .bin) become .safetensors, in a process of their own with limits.

The process is this module: ``python -m lib_lora.core.pickles SOURCE TARGET OVERWRITE MEMORY_BYTES SECONDS``. What is in
the file can at worst end that process.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.core.files import read_header
from lib_lora.core.header import CHECKPOINT_LIMITS
from lib_lora.core.opening import shown
from lib_lora.core.pickle_reader import read_pickle
from lib_lora.core.saving import save_tensors
from lib_lora.errors import FileError, OutputError, PickleRefusedError

if TYPE_CHECKING:
    import os

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 60
DEFAULT_MEMORY_BYTES = 4_000_000_000
STARTING_S = 120  # what importing torch may take on a busy computer, before the file is opened
# Exit codes of the process. Python's own, 1 and 2, mean that it broke.
_CONVERTED = 0
_REFUSED = 10
_NOT_SAVED = 11
_PACKAGE_PARENT = Path(__file__).parents[2]


def convert_pickle(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> None:
    """Write the tensors of a file made by `torch.save` as .safetensors, bit for bit, running nothing that is in it.

    Args:
        source: The pickle.
        target: The .safetensors file to be.
        overwrite: Whether an older file at `target` is replaced.
        timeout_s: Seconds of processor time after which the conversion is given up; of any time, `STARTING_S` later.
        memory_bytes: Memory that it may take beyond the file's own size, where the system can limit it.

    Raises:
        PickleRefusedError: If `source` is a .safetensors file already, holds more than tensors, is damaged, or takes
            more time or memory than allowed.
        OutputError: If `target` can not be written.
        FileError: If `source` can not be read or is something else.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    _expect_pickle(source)
    limits = (str(int(memory_bytes)), str(max(1, int(timeout_s))))
    command = [sys.executable, "-m", __name__, str(source), str(target), str(int(overwrite)), *limits]
    try:
        done = subprocess.run(  # noqa: S603 -- our own module, and paths as arguments
            command,
            cwd=_PACKAGE_PARENT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=STARTING_S + timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        message = f"{shown(source)} is refused: it was not read within {error.timeout:g} s"
        raise PickleRefusedError(message) from error
    if done.returncode != _CONVERTED:
        raise _failure(source, done)


def _expect_pickle(source: Path) -> None:
    try:
        read_header(source, CHECKPOINT_LIMITS)
    except PickleRefusedError:
        return
    raise PickleRefusedError(f"{shown(source)} is a .safetensors file already, there is nothing to convert")


def _failure(source: Path, done: subprocess.CompletedProcess[str]) -> FileError:
    message = done.stderr.strip()
    if done.returncode == _REFUSED:
        return PickleRefusedError(message)
    if done.returncode == _NOT_SAVED:
        return OutputError(message)
    logger.debug("converting %s ended with %d:\n%s", shown(source), done.returncode, message)
    fault = "it takes too much time or memory" if done.returncode < 0 else "its pickle is damaged"
    return PickleRefusedError(f"{shown(source)} is refused: {fault}; get it as .safetensors")


def _limit_process(memory_bytes: int, seconds: int) -> None:
    """Bound this process's memory beyond what it has now, its further processor time, and what a crash leaves."""
    if sys.platform == "win32":
        return
    import resource

    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    if used:  # elsewhere than on Linux the size is not known, and the limit not kept
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _main(source: str, target: str, overwrite: str, memory_bytes: str, seconds: str) -> int:
    _limit_process(int(memory_bytes) + Path(source).stat().st_size, int(seconds))
    try:
        save_tensors(target, read_pickle(source), overwrite=bool(int(overwrite)))
    except OutputError as error:
        sys.stderr.write(str(error))
        return _NOT_SAVED
    except FileError as error:
        sys.stderr.write(str(error))
        return _REFUSED
    except MemoryError:
        sys.stderr.write(f"{shown(source)} is refused: it takes more than {int(memory_bytes):,} bytes of memory")
        return _REFUSED
    return _CONVERTED


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
