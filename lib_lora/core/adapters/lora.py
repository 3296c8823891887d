"""LoRA: ΔW = (alpha / rank) · up @ down, on Linear, 1x1 and k x k convolutions, with Tucker's core where there is one.

Sources: Hu et al. 2021 (arXiv 2106.09685); kohya-ss/sd-scripts `networks/lora.py` for the file format (LierLa: Linear
and 1x1 convolutions, C3Lier: also 3x3); LyCORIS for `lora_mid`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lib_lora.core.adapters.base import DenseAdapter, Factors, check_rank, fold_core, norm, scale_of, wide
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.core.workspace import Workspace

ROLES = frozenset({"lora_up", "lora_down", "lora_mid", "alpha", "scale"})


@dataclass(frozen=True, eq=False)
class LoraAdapter(DenseAdapter):
    """Low-rank update of one layer.

    Attributes:
        up: (out, rank), any floating dtype.
        down: (rank, in) or (rank, in, kh, kw), any floating dtype.
        scale: alpha / rank, or what the file's own `scale` tensor says.
        core: Tucker's core (rank, rank, kh, kw) between the two, or None; `down` is then (rank, in).

    Raises:
        AdapterError: If the parts share no rank, or the scale is not finite.
    """

    up: Tensor
    down: Tensor
    scale: float
    core: Tensor | None = None

    algorithm = "LoRA"

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim not in (2, 4):
            raise AdapterError(f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} are no two matrices")
        core = self.core
        if core is not None and (core.ndim != 4 or self.down.ndim != 2 or core.shape[1] != self.down.shape[0]):
            raise AdapterError(f"mid {tuple(core.shape)} and down {tuple(self.down.shape)} share no rank")
        inner = self.down if self.core is None else self.core
        if self.up.shape[1] != inner.shape[0]:
            raise AdapterError(f"up {tuple(self.up.shape)} and down {tuple(inner.shape)} share no rank")
        if not math.isfinite(self.scale):
            raise AdapterError(f"the scale alpha / rank is {self.scale}")

    @property
    def rank(self) -> int:
        """Number of columns of `up`."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) or (out, in, kh, kw)."""
        kernel = self.down.shape[2:] if self.core is None else self.core.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def bound(self, base_peak: float = 1.0) -> float:
        """|scale| · ‖up‖ · ‖down‖ (Frobenius) ≥ max |ΔW|, by Cauchy and Schwarz."""
        return self._bound

    @cached_property
    def _bound(self) -> float:
        return abs(self.scale) * norm(self.up) * norm(self._inner)

    def factors(self) -> Factors:
        """(out, rank) and (rank, in·kh·kw) in the file's dtype; with a core, `down` is float32."""
        return Factors(self.up, self._inner, self.scale)

    def sliced(self, rank: int) -> LoraAdapter:
        """The first `rank` ranks at the scale of the whole: what the WebUI's ``dyn`` argument does."""
        if self.core is not None:
            return replace(self, up=self.up[:, :rank], core=self.core[:rank])
        return replace(self, up=self.up[:, :rank], down=self.down[:rank])

    def of_rows(self, rows: Sequence[tuple[int, int]]) -> LoraAdapter:
        """The update of these rows alone, in this order: ΔW[rows] = scale · up[rows] @ down."""
        parts = [self.up[start:stop] for start, stop in rows]
        return replace(self, up=parts[0] if len(parts) == 1 else torch.cat(parts))

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · scale · up[rows] @ down."""
        total.addmm_(wide(self.up[rows], total), wide(self._inner, total), alpha=factor * self.scale)

    @cached_property
    def _inner(self) -> Tensor:
        """(rank, in·kh·kw): `down`, Tucker's core folded in."""
        return self.down.flatten(1) if self.core is None else fold_core(self.core, self.down)


def load(tensors: Mapping[str, Tensor], default_alpha: float | None) -> LoraAdapter | None:
    """Read one layer's tensors as LoRA, or None if they are another algorithm's.

    Args:
        tensors: Role → tensor as `naming` names the roles: ``lora_up`` (out, rank[, 1, 1]), ``lora_down``
            (rank, in[, kh, kw]), optional ``lora_mid`` (rank, rank, kh, kw), ``alpha``, ``scale``.
        default_alpha: What stands for alpha where the layer has none; None stands for the layer's rank.

    Raises:
        AdapterError: If the factors do not form a product, or alpha is not one finite number.
    """
    if not {"lora_up", "lora_down"} <= tensors.keys() <= ROLES:
        return None
    up, down, core = tensors["lora_up"], tensors["lora_down"], tensors.get("lora_mid")
    check_rank(up, down)
    if down.ndim not in (2, 4):
        raise AdapterError(f"down has the shape {tuple(down.shape)}; (rank, in) or (rank, in, kh, kw) was expected")
    if core is not None and down.shape[2:] == (1, 1):
        down = down.flatten(1)
    return LoraAdapter(_matrix(up), down, scale_of(tensors, down.shape[0], default_alpha), core)


def _matrix(up: Tensor) -> Tensor:
    """(out, rank, 1, 1) or (out, rank) as (out, rank)."""
    if up.ndim == 4 and up.shape[2:] == (1, 1):
        return up.flatten(1)
    if up.ndim == 2:
        return up
    raise AdapterError(f"up has the shape {tuple(up.shape)}; (out, rank) or (out, rank, 1, 1) was expected")
