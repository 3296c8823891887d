"""OFT: the rows of W0 in blocks, each block turned by an orthogonal matrix R: W = rescale · Rᵀ · W0.

R = (I + Q)(I - Q)⁻¹ with Q = B - Bᵀ (Cayley), Q made no longer than the constraint (COFT).

Sources: Qiu et al. 2023 (arXiv 2306.07280); LyCORIS `modules/diag_oft.py` (``oft_blocks``, ``alpha`` is the constraint
for each output, ``rescale``; ``oft_diag`` of its first version holds R itself); kohya-ss/sd-scripts `networks/oft.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.adapters.base import DenseAdapter, check_rank, matrix, norm, number, wide
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.core.workspace import Workspace

TINY = 1e-8
"""Added to ‖Q‖, as the trainers do."""


def turns(blocks: Tensor, constraint: float) -> Tensor:
    """Cayley's R of each block without its identity: R - I = 2Q(I - Q)⁻¹, float64.

    Trained blocks are small, and a change of some thousandths would lose as many digits beside the identity.

    Args:
        blocks: (..., n, n), any floating dtype.
        constraint: Largest ‖Q‖ over all blocks together, 0 for none.

    Returns:
        NaN where a block holds NaN, or is so large that it can not be inverted.
    """
    wide_blocks = blocks.double()
    skew = wide_blocks - wide_blocks.transpose(-1, -2)
    if constraint > 0:
        length = norm(skew)
        skew = skew * ((min(length, constraint) + TINY) / (length + TINY))
    linalg: Any = torch.linalg  # has no types
    inverse, failed = linalg.inv_ex(torch.eye(skew.shape[-1], dtype=skew.dtype) - skew)
    change = 2.0 * skew @ inverse
    return change.where((failed == 0)[..., None, None], torch.nan)


def constraint_of(tensors: Mapping[str, Tensor], outputs: int) -> float:
    """The constraint of a layer: what the file says for each output times their number, 0 for none."""
    roles = [role for role in ("alpha", "constraint") if role in tensors]
    return number(tensors[roles[0]], roles[0]) * outputs if roles else 0.0


def rescale_of(tensors: Mapping[str, Tensor], outputs: int) -> Tensor | None:
    """(out,) factors of the rows, or None.

    Raises:
        AdapterError: If there is not one for each output.
    """
    rescale = tensors.get("rescale")
    if rescale is not None and (rescale.numel() != outputs or max(rescale.shape, default=1) != outputs):
        raise AdapterError(f"rescale has the shape {tuple(rescale.shape)}, the blocks have {outputs} rows")
    return None if rescale is None else rescale.flatten()


@dataclass(frozen=True, eq=False)
class OftAdapter(DenseAdapter):
    """Block-diagonal rotation of the outputs.

    Attributes:
        blocks: (count, n, n): B of each block, or R itself.
        is_rotation: Whether `blocks` are R.
        constraint: Largest ‖Q‖, 0 for none.
        rescale: (count · n,) or None.

    Raises:
        AdapterError: If the blocks are not square.
    """

    blocks: Tensor
    is_rotation: bool = False
    constraint: float = 0.0
    rescale: Tensor | None = None

    algorithm = "OFT"
    needs_base = True

    def __post_init__(self) -> None:
        if self.blocks.ndim != 3 or self.blocks.shape[1] != self.blocks.shape[2]:
            raise AdapterError(f"the blocks have the shape {tuple(self.blocks.shape)}, (count, n, n) was expected")

    @property
    def rank(self) -> int:
        """Number of blocks, which kohya and LyCORIS call its dimension."""
        return self.blocks.shape[0]

    @property
    def row_step(self) -> int:
        """Rows of a block."""
        return self.blocks.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out,)."""
        return (self.blocks.shape[0] * self.blocks.shape[1],)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the blocks make up the outputs of a weight."""
        return len(shape) > 1 and self.shape[0] == shape[0]

    def shape_text(self) -> str:
        """Number and size of the blocks."""
        return f"{self.blocks.shape[0]} blocks of {self.blocks.shape[1]} outputs"

    def bound(self, base_peak: float = 1.0) -> float:
        """Largest sum of a row of |rescale · Rᵀ - I|, times the largest weight."""
        return self._peak * base_peak

    @cached_property
    def _peak(self) -> float:
        return self._change.abs().sum(-1).max().item()

    @cached_property
    def _change(self) -> Tensor:
        """What W0's rows of a block are multiplied by, (count, n, n) float32: rescale · Rᵀ - I."""
        eye = torch.eye(self.blocks.shape[1], dtype=torch.float64)
        change = self.blocks.double() - eye if self.is_rotation else turns(self.blocks, self.constraint)
        change = change.transpose(1, 2)
        if self.rescale is not None:
            rescale = self.rescale.double().view(*self.blocks.shape[:2], 1)
            change = change * rescale + (rescale - 1.0) * eye
        return change.float()

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · (rescale · Rᵀ - I) · W0[rows], block by block."""
        size = self.row_step
        change = wide(self._change[rows.start // size : rows.stop // size], total)
        blocks = (len(change), size, total.shape[1])
        total.view(blocks).baddbmm_(change, wide(matrix(base[rows]), total).view(blocks), alpha=factor)


def load(tensors: Mapping[str, Tensor], default_alpha: float | None) -> OftAdapter | None:
    """Read ``oft_blocks`` (count, n, n) with optional ``alpha`` and ``rescale``, or ``oft_diag``.

    Raises:
        AdapterError: If the shapes do not fit together.
    """
    role = next((role for role in ("oft_blocks", "oft_diag") if role in tensors), "")
    if not role or tensors[role].ndim == 4 or not tensors.keys() <= {role, "alpha", "constraint", "rescale"}:
        return None
    blocks = tensors[role]
    check_rank(blocks)
    if blocks.ndim != 3:
        raise AdapterError(f"{role} has the shape {tuple(blocks.shape)}, (count, n, n) was expected")
    outputs = blocks.shape[0] * blocks.shape[1]
    if role == "oft_diag":
        return OftAdapter(blocks, is_rotation=True, rescale=rescale_of(tensors, outputs))
    return OftAdapter(blocks, False, constraint_of(tensors, outputs), rescale_of(tensors, outputs))
