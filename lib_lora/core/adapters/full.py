"""Full: ΔW = diff, a change of every number, of a weight or a bias; also the biases that other algorithms carry.

Sources: LyCORIS `modules/full.py` (``diff``, ``diff_b``); PEFT `lora_bias` (``lora_B.bias``, scaled as its LoRA is).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lib_lora.core.adapters.base import DenseAdapter, check_rank, matrix, peak, wide

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lib_lora.core.workspace import Workspace

ROLES = ("diff", "diff_b", "lora_bias")


@dataclass(frozen=True, eq=False)
class FullAdapter(DenseAdapter):
    """A change that the file holds whole.

    Attributes:
        diff: Of the parameter's shape, any floating dtype.
        scale: What it is multiplied by.
        algorithm: ``Full``, or whose part it is.
    """

    diff: Tensor
    scale: float = 1.0
    algorithm: str = "Full"

    @property
    def rank(self) -> int:
        """The smaller side: a full matrix."""
        return min(matrix(self.diff).shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(self.diff.shape)

    def bound(self, base_peak: float = 1.0) -> float:
        """The largest number."""
        return self._bound

    @cached_property
    def _bound(self) -> float:
        return abs(self.scale) * peak(self.diff)

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · scale · diff[rows]."""
        total.add_(wide(matrix(self.diff[rows]), total), alpha=factor * self.scale)


def load(tensors: Mapping[str, Tensor], default_alpha: float | None) -> FullAdapter | None:
    """Read ``diff`` or a bias (``diff_b``, ``lora_bias``) as it is; an alpha beside it says nothing, as in LyCORIS.

    Raises:
        AdapterError: If it is empty.
    """
    roles = [role for role in ROLES if role in tensors]
    if len(roles) != 1 or not tensors.keys() <= {roles[0], "alpha"}:
        return None
    diff = tensors[roles[0]]
    check_rank(diff)
    return FullAdapter(diff.reshape(1) if diff.ndim == 0 else diff)
