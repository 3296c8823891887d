"""How torch and Python say that memory is short, and freed memory, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

import torch

OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError)
"""To be caught before RuntimeError, which the first one is."""


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


def return_memory() -> None:
    """Let the allocators hand back what is free: the C library's heap keeps LoRA files of up to 32 MB otherwise."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
