"""GLoRA: ΔW = (alpha / rank) · (W0 · A + B), A and B low-rank: A mixes the layer's inputs, B is a LoRA.

Sources: Chavan et al. 2023 (arXiv 2306.07967); LyCORIS `modules/glora.py`: A = a1 @ a2, B = b1 @ b2. In its first
layout, which the WebUI reads, the names are the other way round: A = a2 @ a1, B = b2 @ b1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lib_lora.core.adapters.base import DenseAdapter, check_rank, matrix, norm, scale_of, wide
from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.core.workspace import Workspace

ROLES = frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "alpha", "scale"})


@dataclass(frozen=True, eq=False)
class GloraAdapter(DenseAdapter):
    """A low-rank change of the inputs, and a LoRA.

    Attributes:
        up: (in, rank), any floating dtype.
        down: (rank, in); A = up @ down.
        scale: alpha / rank, of both branches.
        branch: B as a LoRA, or None where it is applied elsewhere.
        old_layout: Whether the file has the first layout's names.

    Raises:
        AdapterError: If A is no square product, or its width is not B's.
    """

    up: Tensor
    down: Tensor
    scale: float
    branch: LoraAdapter | None
    old_layout: bool = False

    algorithm = "GLoRA"
    needs_base = True

    def __post_init__(self) -> None:
        up, down = self.up.shape, self.down.shape
        if len(up) != 2 or up != (down[1], down[0]) or (self.branch and self.branch.shape[1] != up[0]):
            raise AdapterError(
                f"A is {tuple(up)} times {tuple(down)}, B is {self.branch and self.branch.shape}; (in, rank) times "
                "(rank, in) was expected"
            )

    @property
    def rank(self) -> int:
        """Rank of A."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """B's."""
        return () if self.branch is None else self.branch.shape

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether B fits, and with it A."""
        return len(shape) > 1 and shape[1] == len(self.up) and (self.branch is None or self.branch.fits(shape))

    def shape_text(self) -> str:
        """B's shape."""
        return str(self.shape)

    def bound(self, base_peak: float = 1.0) -> float:
        """B's bound, and ‖row of W0‖₁ ≤ √in · ‖row‖ for A; a k x k kernel is not mixed."""
        inner = abs(self.scale) * norm(self.up) * norm(self.down) * len(self.up) ** 0.5 * base_peak
        return inner + (0.0 if self.branch is None else self.branch.bound())

    def split(self) -> tuple[LoraAdapter | None, GloraAdapter]:
        """B, which can be added to a forward, and A alone, which needs the weight."""
        return self.branch, replace(self, branch=None)

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · scale · (W0[rows] · up · down + B[rows])."""
        if self.branch is not None:
            self.branch.add_to(total, base, rows, factor, workspace)
        up, down = wide(self.up, total), wide(self.down, total)
        part = wide(matrix(base[rows]), total).view(len(total), len(up), -1)
        mixed = torch.einsum("ojk,ji->oik", torch.einsum("oik,ij->ojk", part, up), down)
        total.add_(mixed.flatten(1), alpha=factor * self.scale)


def load(tensors: Mapping[str, Tensor], default_alpha: float | None) -> GloraAdapter | None:
    """Read ``a1``, ``a2``, ``b1``, ``b2`` and optional ``bm`` (Tucker's core of B), in either layout.

    On a square layer both may fit: the one of lower rank is meant. Where all sides are as long as the rank they can
    not be told apart, and the present one is taken.

    Raises:
        AdapterError: If the shapes fit neither layout.
    """
    if not {"a1.weight", "a2.weight", "b1.weight", "b2.weight"} <= tensors.keys() <= ROLES:
        return None
    a1, a2, b1, b2 = (tensors[f"{role}.weight"] for role in ("a1", "a2", "b1", "b2"))
    check_rank(a1, a2, b1, b2)
    if any(part.ndim not in (2, 4) for part in (a1, a2, b1, b2)):
        raise AdapterError("a1, a2, b1 and b2 must be matrices or kernels")
    layouts = [parts for parts in ((a1, a2, b1, b2), (a2, a1, b2, b1)) if _shares_rank(*parts)]
    if not layouts:
        shapes = ", ".join(str(tuple(part.shape)) for part in (a1, a2, b1, b2))
        raise AdapterError(f"a1, a2, b1, b2 of the shapes {shapes} share no rank")
    a_up, a_down, b_up, b_down = min(layouts, key=lambda parts: parts[0].shape[1])
    scale = scale_of(tensors, a_up.shape[1], default_alpha)
    core = tensors.get("bm.weight")
    b_down = b_down.flatten(1) if core is not None else b_down
    return GloraAdapter(
        a_up.flatten(1), a_down.flatten(1), scale, LoraAdapter(b_up.flatten(1), b_down, scale, core), a_up is a2
    )


def _shares_rank(a_up: Tensor, a_down: Tensor, b_up: Tensor, b_down: Tensor) -> bool:
    return a_up.shape[1] == a_down.shape[0] == b_up.shape[1] == b_down.shape[0] and a_up.shape[0] == a_down.shape[1]
