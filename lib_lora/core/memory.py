"""How torch and Python say that memory is short, and freed memory, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

import torch

OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError)
"""To be caught before RuntimeError, which the first one is."""


def return_memory() -> None:
    """Let the allocators hand back what is free: the C library's heap keeps LoRA files of up to 32 MB otherwise."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
