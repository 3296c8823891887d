"""A moving average of what is trained."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from torch import Tensor

_PREFIX = "average."


class MovingAverage:
    """Of parameters, in their type: mean ← decay · mean + (1 - decay) · parameter; early steps count more."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self._means = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters in, which were moved for the `step`-th time."""
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._means, self._parameters, 0)  # all in a few kernels

    @contextmanager
    def applied(self) -> Generator[None]:
        """The parameters are their averages inside of the block."""
        now = [parameter.detach().clone() for parameter in self._parameters]
        self._write(self._means)
        try:
            yield
        finally:
            self._write(now)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {f"{_PREFIX}{index}": mean for index, mean in enumerate(self._means)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Of a checkpoint."""
        for index, mean in enumerate(self._means):
            mean.copy_(tensors[f"{_PREFIX}{index}"])

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
