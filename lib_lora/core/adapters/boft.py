"""BOFT: the outputs turned by a butterfly of small rotations: stage i mixes rows within groups of 2ⁱ blocks.

Sources: Liu et al. 2023 (arXiv 2311.06243); LyCORIS `modules/boft.py` (``oft_blocks`` with four dimensions, ``alpha``,
``rescale`` as in OFT). ΔW is the full butterfly's; a strength multiplies it, as in the WebUI.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lib_lora.core.adapters.base import DenseAdapter, check_rank, matrix, peak, wide
from lib_lora.core.adapters.oft import constraint_of, rescale_of, turns
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.core.workspace import Workspace

PIECE_BYTES = 2 << 20
"""Columns do not mix, so they are turned in pieces of about this size."""


@dataclass(frozen=True, eq=False)
class BoftAdapter(DenseAdapter):
    """Butterfly of block-diagonal rotations.

    Attributes:
        blocks: (stages, count, n, n), B of each block.
        constraint: Largest ‖Q‖, 0 for none.
        rescale: (count · n,) or None.

    Raises:
        AdapterError: If the blocks are not square, or n is odd.
    """

    blocks: Tensor
    constraint: float = 0.0
    rescale: Tensor | None = None

    algorithm = "BOFT"
    needs_base = True
    row_step = 0

    def __post_init__(self) -> None:
        shape = self.blocks.shape
        if len(shape) != 4 or shape[2] != shape[3] or shape[2] % 2:
            raise AdapterError(f"the blocks have the shape {tuple(shape)}, (stages, count, n, n) with n even is needed")

    @property
    def rank(self) -> int:
        """Number of blocks in a stage."""
        return self.blocks.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out,)."""
        return (self.blocks.shape[1] * self.blocks.shape[2],)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the blocks make up the outputs, and the last stage's groups divide them."""
        stages, _, size, _ = self.blocks.shape
        return len(shape) > 1 and self.shape[0] == shape[0] and shape[0] % (2 ** (stages - 1) * size) == 0

    def shape_text(self) -> str:
        """Number of stages, number and size of the blocks."""
        stages, count, size, _ = self.blocks.shape
        return f"{stages} stages of {count} blocks of {size} outputs"

    def bound(self, base_peak: float = 1.0) -> float:
        """Over the stages the product of the largest row sums of |R|, times rescale, plus 1, times the weight."""
        return self._peak * base_peak

    @cached_property
    def _peak(self) -> float:
        stages = (self._changes.abs().sum(-1).flatten(1).amax(1) + 1.0).prod().item()
        return stages * (1.0 if self.rescale is None else peak(self.rescale)) + 1.0

    @cached_property
    def _changes(self) -> Tensor:
        """R - I of each block, (stages, count, n, n) float32."""
        return turns(self.blocks, self.constraint).float()

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · (rescale · butterfly(W0) - W0), some columns at a time."""
        changes, weight = wide(self._changes, total), matrix(base)
        rescale = None if self.rescale is None else wide(self.rescale, total)[:, None]
        step = max(1, PIECE_BYTES // (4 * len(weight)))
        for start in range(0, weight.shape[1], step):
            columns = slice(start, start + step)
            part = wide(weight[:, columns], total)
            delta = _butterfly(part, changes)
            if rescale is not None:
                delta = torch.addcmul(delta * rescale, part, rescale - 1.0)
            total[:, columns].add_(delta, alpha=factor)


def _butterfly(part: Tensor, changes: Tensor) -> Tensor:
    """Butterfly(part) - part: what each stage adds is summed, so that a small change is not lost beside the weight."""
    delta = torch.zeros_like(part)
    for stage, change in enumerate(changes):
        delta += _mix(part + delta, change, 2**stage * change.shape[-1] // 2)
    return delta


def _mix(rows: Tensor, change: Tensor, distance: int) -> Tensor:
    """One stage: rows (out, columns) that are `distance` apart are brought together in blocks, turned, put back."""
    count, size, columns = len(change), change.shape[-1], rows.shape[1]
    pairs = rows.reshape(-1, 2, distance, columns).transpose(1, 2).reshape(count, size, columns)
    mixed = (change @ pairs).reshape(-1, distance, 2, columns)
    return mixed.transpose(1, 2).reshape(rows.shape)


def load(tensors: Mapping[str, Tensor], default_alpha: float | None) -> BoftAdapter | None:
    """Read ``oft_blocks`` (stages, count, n, n) with optional ``alpha`` and ``rescale``.

    Raises:
        AdapterError: If the shapes do not fit together.
    """
    blocks = tensors.get("oft_blocks")
    if blocks is None or blocks.ndim != 4 or not tensors.keys() <= {"oft_blocks", "alpha", "constraint", "rescale"}:
        return None
    check_rank(blocks)
    outputs = blocks.shape[1] * blocks.shape[2]
    return BoftAdapter(blocks, constraint_of(tensors, outputs), rescale_of(tensors, outputs))
