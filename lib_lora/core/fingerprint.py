"""Samples of weights, to notice that somebody else wrote to them."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SAMPLES = 32
"""Elements looked at in each weight, evenly spread."""


class Change(Enum):
    """What happened to a weight between two samples of it."""

    NONE = "unchanged"
    CONVERTED = "the same numbers in another dtype"
    REPLACED = "other numbers"


def samples(weights: Sequence[Tensor]) -> list[Tensor]:
    """`SAMPLES` evenly spread elements of each weight, 1-D on the CPU; one transfer for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, weight in enumerate(weights):
        groups.setdefault((weight.device, weight.dtype), []).append(index)
    result: list[Tensor] = [torch.empty(0)] * len(weights)
    for (_, dtype), indices in groups.items():
        pieces = [_sample(weights[index]) for index in indices]
        joined = torch.cat(pieces).cpu().view(dtype)
        start = 0
        for index, piece in zip(indices, pieces, strict=True):
            result[index] = joined[start : (start := start + piece.numel())]
    return result


def compare(before: Tensor, now: Tensor) -> Change:
    """Bit for bit, so NaN equals itself; a converted dtype is told from other numbers."""
    if before.dtype != now.dtype:
        return Change.CONVERTED if _same_bits(before.to(now.dtype), now) else Change.REPLACED
    return Change.NONE if _same_bits(before, now) else Change.REPLACED


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _sample(weight: Tensor) -> Tensor:
    count = min(SAMPLES, weight.numel())
    step = max(1, weight.numel() // max(1, count))
    sample = weight.detach().as_strided((count,), (step,), weight.storage_offset())
    return sample.view(torch.uint8) if sample.element_size() == 1 else sample
