"""How much an adapter changes a layer: ‖ΔW‖ (Frobenius) at strength 1, without forming ΔW where that can be."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from lib_lora.core.adapters import is_low_rank
from lib_lora.core.adapters.base import norm
from lib_lora.core.adapters.full import FullAdapter
from lib_lora.core.adapters.lokr import LokrAdapter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from lib_lora.core.adapters import Factors, WeightAdapter


def delta_norm(adapter: WeightAdapter, base: Tensor | None = None) -> float | None:
    """‖ΔW‖ of one layer.

    Args:
        adapter: The update.
        base: The untouched weight; None where no model is at hand.

    Returns:
        The norm, or None where it depends on the weight and there is none.
    """
    if is_low_rank(adapter):
        return factors_norm(adapter.factors())
    if isinstance(adapter, LokrAdapter):
        return adapter.delta_norm()
    if isinstance(adapter, FullAdapter):
        return abs(adapter.scale) * norm(adapter.diff)
    if base is None and not adapter.needs_base:
        base = torch.empty(adapter.shape)
    return None if base is None else norm(adapter.delta_weight(base))


def factors_norm(factors: Factors) -> float:
    """‖ΔW‖ of a low-rank update without forming ΔW: ‖BA‖² = Σ (BᵀB ∘ AAᵀ), with B = up and A = down.

    Args:
        factors: up (out, rank), down (rank, in), any floating dtype; computed in float64.
    """
    up, down = factors.up.double(), factors.down.double()
    square = ((up.T @ up) * (down @ down.T)).sum().item()
    return abs(factors.scale) * math.sqrt(max(square, 0.0))


def shares(norms: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """Part of the whole change, Σ‖ΔW‖², that lies in each block, sorted by its name.

    Args:
        norms: Block and ‖ΔW‖ of each layer; a layer without a norm is left out.
    """
    squares: defaultdict[str, float] = defaultdict(float)
    for block, value in norms:
        squares[block] += 0.0 if value is None else value**2
    whole = sum(squares.values()) or 1.0
    return {block: squares[block] / whole for block in sorted(squares)}
