"""One LoRA algorithm a file, and the list of them: a new algorithm is a new module and a new line in `LOADERS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.core.adapters import lora
from lib_lora.core.adapters.base import Factors, LowRankAdapter, WeightAdapter, is_low_rank
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    Loader = Callable[[Mapping[str, Tensor], float | None], WeightAdapter | None]

__all__ = ["Factors", "LowRankAdapter", "WeightAdapter", "is_low_rank", "load_adapter"]

LOADERS: tuple[Loader, ...] = (lora.load,)


def load_adapter(tensors: Mapping[str, Tensor], default_alpha: float | None = None) -> WeightAdapter:
    """Read the tensors of one layer.

    Args:
        tensors: Role (``lora_up``, ``alpha``, ``hada_w1_a``, …) → tensor.
        default_alpha: Alpha of a layer that has none, or None for its rank.

    Raises:
        AdapterError: If no algorithm knows these roles, or their shapes do not fit together.
    """
    for load in LOADERS:
        if (adapter := load(tensors, default_alpha)) is not None:
            return adapter
    raise AdapterError(f"no known algorithm has the tensors {', '.join(sorted(tensors))}")
