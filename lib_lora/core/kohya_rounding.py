"""ΔW added as kohya's merge script does: every step is rounded to the precision that is asked for.

Source: networks/merge_lora.py of sd-scripts, whose ``--precision`` this is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.core.adapters import is_low_rank

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.numerics import Term


def fuse_layer_kohya(base: Tensor, terms: Iterable[Term], out: Tensor, precision: torch.dtype) -> None:
    """Write W0 + (strength · ΔW) · scale + … to `out`, one network after the other.

    Args:
        base: The untouched parameter in any floating dtype.
        terms: What is added.
        out: Of base's shape and device.
        precision: What the weight, the factors, the products and every sum are rounded to.
    """
    weight = base.to(precision)
    for adapter, factor in terms:
        delta, scale = _rounded_delta(adapter, weight)
        weight = weight + (factor * delta) * scale
    out.copy_(weight)


def _rounded_delta(adapter: WeightAdapter, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The update and alpha / rank; an algorithm that the script does not know has its scale in the update."""
    if not is_low_rank(adapter):
        return adapter.delta_weight(weight).to(weight.dtype), weight.new_ones(())
    up, down, scale = adapter.factors()
    # the sum over the rank is wider than the factors, as in any library's product
    up, down = (factor.to(weight.device, weight.dtype).float() for factor in (up, down))
    return (up @ down).to(weight.dtype).view(weight.shape), weight.new_tensor(scale)
