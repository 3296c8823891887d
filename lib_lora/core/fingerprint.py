"""Samples of weights, to notice that somebody else wrote to them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SAMPLES = 32
"""Elements looked at in each weight, evenly spread."""


class Gathered:
    """Elements of many weights, on their device until somebody looks: a GPU need not be waited for before that."""

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        """Args: pieces: 1-D, of one device and dtype."""
        self._data = torch.cat([*pieces])

    @cached_property
    def content(self) -> bytes:
        """All bytes."""
        return self._data.cpu().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True, eq=False)
class Sample:
    """Some elements of a weight.

    Attributes:
        dtype: Of the weight.
        gathered: Where they are, among others.
        start: Of their bytes there.
        stop: The same.
    """

    dtype: torch.dtype
    gathered: Gathered
    start: int
    stop: int

    @property
    def content(self) -> bytes:
        """Their bytes."""
        return self.gathered.content[self.start : self.stop]


class Change(Enum):
    """What happened to a weight between two samples of it."""

    NONE = "unchanged"
    CONVERTED = "the same numbers in another dtype"
    REPLACED = "other numbers"


def samples(weights: Sequence[Tensor]) -> list[Sample]:
    """`SAMPLES` evenly spread elements of each weight; one transfer for each device and dtype, when they are read."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, weight in enumerate(weights):
        groups.setdefault((weight.device, weight.dtype), []).append(index)
    result: dict[int, Sample] = {}
    for (_, dtype), indices in groups.items():
        pieces = [_elements(weights[index]) for index in indices]
        if dtype.itemsize == 1:
            pieces = [piece.view(torch.uint8) for piece in pieces]  # not all devices join numbers in fp8
        gathered, stop = Gathered(pieces), 0
        for index, piece in zip(indices, pieces, strict=True):
            start, stop = stop, stop + piece.numel() * dtype.itemsize
            result[index] = Sample(dtype, gathered, start, stop)
    return [result[index] for index in range(len(weights))]


def compare(before: Sample, now: Sample) -> Change:
    """Bit for bit, so NaN equals itself; a converted dtype is told from other numbers."""
    if before.dtype == now.dtype:
        return Change.NONE if before.content == now.content else Change.REPLACED
    converted = torch.frombuffer(bytearray(before.content), dtype=before.dtype).to(now.dtype)
    same = converted.view(torch.uint8).numpy().tobytes() == now.content
    return Change.CONVERTED if same else Change.REPLACED


def _elements(weight: Tensor) -> Tensor:
    numbers = weight.numel()
    count = min(SAMPLES, numbers)
    return weight.as_strided((count,), (numbers // count,), weight.storage_offset())
