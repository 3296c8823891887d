"""LoHa: ΔW = (alpha / rank) · (w1_a @ w1_b) ⊙ (w2_a @ w2_b), each half with Tucker's core where there is one.

Sources: Hyeon-Woo et al. 2021 (arXiv 2108.06098); LyCORIS `modules/loha.py`; PEFT writes the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from lib_lora.core.adapters.base import DenseAdapter, check_rank, fold_core, norm, scale_of, wide
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lib_lora.core.workspace import Workspace

ROLES = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha", "scale"})


class Half(NamedTuple):
    """One of the two matrices that are multiplied number by number.

    Attributes:
        up: (out, rank), or (rank, out) with a core.
        down: (rank, in[, kh, kw]), or (rank, in) with a core.
        core: (rank, rank, kh, kw) or None.
    """

    up: Tensor
    down: Tensor
    core: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in[, kh, kw])."""
        if self.core is None:
            return (self.up.shape[0], *self.down.shape[1:])
        return (self.up.shape[1], self.down.shape[1], *self.core.shape[2:])

    def check(self) -> None:
        """Refuse parts that share no rank."""
        check_rank(*(part for part in self if part is not None))
        if self.core is None:
            fits = self.up.ndim == 2 and self.down.ndim in (2, 4) and self.up.shape[1] == self.down.shape[0]
        else:
            ranks = (*self.up.shape[:1], *self.down.shape[:1])
            fits = self.up.ndim == self.down.ndim == 2 and self.core.ndim == 4 and self.core.shape[:2] == ranks
        if not fits:
            shapes = (tuple(part.shape) for part in self if part is not None)
            raise AdapterError(f"the factors of a half share no rank: {', '.join(map(str, shapes))}")

    def bound(self) -> float:
        """‖up‖ · ‖down‖ · ‖core‖ ≥ the largest number of the product."""
        return norm(self.up) * norm(self.down) * (1.0 if self.core is None else norm(self.core))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in·kh·kw)."""
        if self.core is None:
            return self.up, self.down.flatten(1)
        return self.up.t(), fold_core(self.core, self.down)


@dataclass(frozen=True, eq=False)
class LohaAdapter(DenseAdapter):
    """Hadamard product of two low-rank matrices.

    Attributes:
        first: One matrix.
        second: The other.
        scale: alpha / rank.

    Raises:
        AdapterError: If the two have other shapes, or the parts of one share no rank.
    """

    first: Half
    second: Half
    scale: float

    algorithm = "LoHa"

    def __post_init__(self) -> None:
        self.first.check()
        self.second.check()
        if self.first.shape != self.second.shape:
            raise AdapterError(f"the two halves have the shapes {self.first.shape} and {self.second.shape}")

    @property
    def rank(self) -> int:
        """Rank of each half; the product's is up to its square."""
        return self.first.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in[·kh·kw]) or (out, in, kh, kw)."""
        return self.first.shape

    def bound(self, base_peak: float = 1.0) -> float:
        """Product of the bounds of the halves."""
        return self._bound

    @cached_property
    def _bound(self) -> float:
        return abs(self.scale) * self.first.bound() * self.second.bound()

    @cached_property
    def _factors(self) -> tuple[Tensor, ...]:
        return (*self.first.factors(), *self.second.factors())

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · scale · (up1[rows] @ down1) ⊙ (up2[rows] @ down2)."""
        up1, down1, up2, down2 = (wide(part, total) for part in self._factors)
        halves: list[Tensor] = []
        for name, up, down in (("first half", up1, down1), ("second half", up2, down2)):
            half = workspace.take(name, (len(total), down.shape[1]), torch.float32, total.device)
            halves.append(torch.mm(up[rows], down, out=half))
        total.addcmul_(*halves, value=factor * self.scale)


def load(tensors: Mapping[str, Tensor], default_alpha: float | None) -> LohaAdapter | None:
    """Read one layer's tensors as LoHa, or None if they are another algorithm's.

    Args:
        tensors: Role → tensor: ``hada_w1_a`` (out, rank), ``hada_w1_b`` (rank, in·kh·kw), the same with ``w2``;
            with ``hada_t1``, ``hada_t2`` (rank, rank, kh, kw) the factors are (rank, out) and (rank, in).
        default_alpha: Alpha of a layer that has none, or None for its rank.

    Raises:
        AdapterError: If the tensors do not form two matrices of one shape.
    """
    if not {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= tensors.keys() <= ROLES:
        return None
    first, second = (Half(tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"], tensors.get(f"hada_t{i}")) for i in (1, 2))
    first.check()
    return LohaAdapter(first, second, scale_of(tensors, first.down.shape[0], default_alpha))
