"""Scratch memory that is reused from layer to layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Workspace:
    """Memory that is reused from layer to layer.

    A fresh block of some MB is handed out by the system page by page, which costs more than filling it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor of `shape`, valid until the next call with this name."""
        buffer = self._buffers.get((name, dtype, device))
        size = math.prod(shape)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)
