"""Which layers of a switch are written together, and by which kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from lib_lora.core.gpu.graphs import CudaRecorder, SwitchGraphs
from lib_lora.core.gpu.grouped import GroupedKernel, can_group

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lib_lora.core.gpu.grouped import Sum

SwitchKind = Literal["auto", "layers", "grouped", "graph"]
"""How layers are written: one after the other, together, or together by replayed graphs; ``auto`` is ``grouped`` on an
NVIDIA or AMD GPU and ``layers`` elsewhere. Graphs keep memory for what they replay."""


class GroupedSwitch:
    """The kernels of a model's devices."""

    def __init__(self, kind: SwitchKind = "auto") -> None:
        self._kind: SwitchKind = kind
        self._kernels: dict[torch.device, GroupedKernel] = {}

    @property
    def is_off(self) -> bool:
        """Whether it takes no layer at all."""
        return self._kind == "layers" or (self._kind == "auto" and not torch.cuda.is_initialized())

    def takes(self, out: Tensor) -> bool:
        """Whether low-rank sums can be written to this weight together with others."""
        if self.is_off or (self._kind == "auto" and out.device.type != "cuda"):
            return False
        return can_group(out)

    def write(self, sums: Sequence[Sum], *, near: bool) -> None:
        """Write layers that `takes` takes, those of a device together.

        Args:
            sums: The layers.
            near: Whether their bases lie in the memory of their device.

        Raises:
            RuntimeError: torch's own, among them OutOfMemoryError.
        """
        for device in dict.fromkeys(entry.out.device for entry in sums):
            self._kernel(device).write([entry for entry in sums if entry.out.device == device], near=near)

    def clear(self) -> None:
        """Free all memory."""
        self._kernels.clear()

    def _kernel(self, device: torch.device) -> GroupedKernel:
        if device not in self._kernels:
            graphs = SwitchGraphs(CudaRecorder(device)) if self._kind == "graph" and device.type == "cuda" else None
            self._kernels[device] = GroupedKernel(device, graphs)
        return self._kernels[device]
