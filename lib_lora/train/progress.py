"""How far a training is, for a progress bar or a page."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import psutil
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

RECENT_STEPS = 50
"""Over which loss and speed are averaged."""


@dataclass(frozen=True)
class TrainProgress:
    """After a step.

    Attributes:
        step: Steps of the optimizer that are done.
        steps: Of so many.
        epoch: From 1.
        loss: Of this step.
        mean_loss: Of the last `RECENT_STEPS`.
        rates: Group of parameters → learning rate.
        steps_per_second: Of the last `RECENT_STEPS`.
        memory_bytes: Taken at most on the GPU; without one, by the process now.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    mean_loss: float
    rates: dict[str, float]
    steps_per_second: float
    memory_bytes: int

    @property
    def seconds_left(self) -> float:
        """At this speed."""
        return (self.steps - self.step) / self.steps_per_second if self.steps_per_second else 0.0


Listener: TypeAlias = "Callable[[TrainProgress], None]"


def unheard(_: TrainProgress) -> None:
    """Nobody wants to know."""


class Meter:
    """Averages over the last steps."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._losses: deque[float] = deque(maxlen=RECENT_STEPS)
        self._times: deque[float] = deque([time.perf_counter()], maxlen=RECENT_STEPS + 1)

    def after_step(self, step: int, epoch: int, loss: float, rates: dict[str, float]) -> TrainProgress:
        """Take a step in."""
        self._losses.append(loss)
        self._times.append(time.perf_counter())
        taken = self._times[-1] - self._times[0]
        speed = (len(self._times) - 1) / taken if taken else 0.0
        memory = memory_bytes(self._device)
        return TrainProgress(step, self._steps, epoch, loss, self.mean_loss, rates, speed, memory)

    @property
    def mean_loss(self) -> float:
        """Of the last steps; NaN before the first."""
        return sum(self._losses) / len(self._losses) if self._losses else math.nan


def memory_bytes(device: torch.device) -> int:
    """Most that was taken on a GPU, or what the process has now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
