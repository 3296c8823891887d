"""One LoRA algorithm a file, and the list of them: a new algorithm is a new module and a new line in `LOADERS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.core.adapters import boft, dora, full, glora, ia3, loha, lokr, lora, norm, oft
from lib_lora.core.adapters.base import Factors, LowRankAdapter, WeightAdapter, is_low_rank
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    Loader = Callable[[Mapping[str, Tensor], float | None], WeightAdapter | None]

__all__ = ["Factors", "LowRankAdapter", "WeightAdapter", "is_low_rank", "load_adapter", "split_linear"]

LOADERS: tuple[Loader, ...] = (
    lora.load,
    loha.load,
    lokr.load,
    full.load,
    norm.load,
    ia3.load,
    oft.load,
    boft.load,
    glora.load,
)
DECOMPOSABLE: tuple[Loader, ...] = (lora.load, loha.load, lokr.load)
"""What DoRA's magnitudes can stand beside."""
SETTINGS_ELSEWHERE = {"oft_R.weight": "PEFT's OFT", "boft_R": "PEFT's BOFT"}
"""Role → algorithm that can not be read: a block's number of inputs, its series or its eps are settings."""


def load_adapter(tensors: Mapping[str, Tensor], default_alpha: float | None = None) -> WeightAdapter:
    """Read the tensors of one parameter.

    Args:
        tensors: Role (``lora_up``, ``alpha``, ``hada_w1_a``, …) → tensor.
        default_alpha: Alpha of a layer that has none, or None for its rank.

    Raises:
        AdapterError: If no algorithm knows these roles, or their shapes do not fit together.
    """
    inner = {role: tensor for role, tensor in tensors.items() if role not in dora.ROLES}
    for load in LOADERS if len(inner) == len(tensors) else DECOMPOSABLE:
        if (adapter := load(inner, default_alpha)) is not None:
            return dora.wrap(adapter, tensors)
    for role, algorithm in SETTINGS_ELSEWHERE.items():
        if role in tensors:
            raise AdapterError(
                f"{algorithm} depends on settings that the file does not hold; merge it where it was made"
            )
    raise AdapterError(f"no known algorithm has the tensors {', '.join(sorted(tensors))}")


def split_linear(adapter: WeightAdapter) -> tuple[WeightAdapter | None, WeightAdapter | None]:
    """The part of an adapter that can be added to a forward, and the part that needs the layer's weight."""
    if isinstance(adapter, glora.GloraAdapter):
        return adapter.split()
    return (None, adapter) if adapter.needs_base else (adapter, None)
