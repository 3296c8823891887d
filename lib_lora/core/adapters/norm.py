"""Norm: a change of the weight and bias of a LayerNorm or GroupNorm. Source: LyCORIS `modules/norms.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.core.adapters.base import check_rank
from lib_lora.core.adapters.full import FullAdapter
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def load(tensors: Mapping[str, Tensor], default_alpha: float | None) -> FullAdapter | None:
    """Read ``w_norm`` (channels,) of a weight, or ``b_norm`` (channels,) of a bias.

    Raises:
        AdapterError: If it is no vector.
    """
    roles = tensors.keys() - {"alpha"}
    if roles not in ({"w_norm"}, {"b_norm"}):
        return None
    (role,) = roles
    check_rank(tensors[role])
    if tensors[role].ndim != 1:
        raise AdapterError(f"{role} has the shape {tuple(tensors[role].shape)}, (channels,) was expected")
    return FullAdapter(tensors[role], algorithm="Norm")
