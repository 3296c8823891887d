"""Memory: how torch and Python say that it is short, large blocks of it, and what is freed given back to the system."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError)
"""To be caught before RuntimeError, which the first one is."""
LARGE_BYTES = 32 << 20
"""From this size on, `new_block` asks for large pages."""


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, or None where nobody tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    known = Path("/proc/meminfo")
    if device.type != "cpu" or not known.exists():
        return None
    lines = known.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def new_block(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory that is filled once and kept; in RAM, of pages as large as the system has.

    Linux hands out 4 kB at a time unless it is asked for 2 MB, which makes the first write ten times as fast.

    Args:
        count: Number of elements.
        dtype: Of each.
        device: Where.

    Raises:
        MemoryError: Or torch's own; see `OUT_OF_MEMORY`.
    """
    size = count * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if device.type != "cpu" or advice is None or size < LARGE_BYTES:
        return torch.empty(count, dtype=dtype, device=device)
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size / 1e6:.0f} MB: {error}") from error
    with suppress(OSError):  # a kernel without large pages
        block.madvise(advice)
    return torch.frombuffer(block, dtype=dtype)


def return_memory() -> None:
    """Let the allocators hand back what is free: the C library's heap keeps LoRA files of up to 32 MB otherwise."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
