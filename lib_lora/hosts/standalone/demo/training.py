"""What the demo's two training loops share."""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


def seeded(seed: int) -> random.Random:
    """Seed torch, and a generator for the pictures."""
    torch.manual_seed(seed)
    return random.Random(seed)  # noqa: S311 - pictures, no secrets


class Average:
    """Exponential moving average of a number, for progress lines and the provenance."""

    def __init__(self, decay: float = 0.98) -> None:
        self.value = float("nan")
        self._decay = decay

    def add(self, value: float) -> None:
        """Take one more value in."""
        self.value = value if math.isnan(self.value) else self._decay * self.value + (1 - self._decay) * value


Module = TypeVar("Module", bound=torch.nn.Module)


class Ema(Generic[Module]):
    """Moving average of a module's weights; `module` is the averaged copy."""

    def __init__(self, module: Module, decay: float = 0.998) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Take the current weights in; early updates weigh more."""
        self._updates += 1
        decay = min(self._decay, self._updates / (self._updates + 10))
        for mean, now in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)


def cosine_steps(optimizer: torch.optim.Optimizer, steps: int, name: str, loss: Average) -> Iterator[int]:
    """Step numbers; after each body the optimiser steps, its rate warming up for 100 steps and falling to 2 %."""
    peak = [group["lr"] for group in optimizer.param_groups]
    start = time.monotonic()
    for step in range(steps):
        factor = min(1.0, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
        yield step
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            log.info("%s %d/%d loss %.4f, %.0f s", name, step + 1, steps, loss.value, time.monotonic() - start)
