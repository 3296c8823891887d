"""LoRA: ΔW = (alpha / rank) · up @ down, on Linear, 1x1 and k x k convolutions, with Tucker's core where there is one.

Sources: Hu et al. 2021 (arXiv 2106.09685); kohya-ss/sd-scripts `networks/lora.py` for the file format (LierLa: Linear
and 1x1 convolutions, C3Lier: also 3x3); LyCORIS for `lora_mid`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.adapters.base import Factors
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

ROLES = frozenset({"lora_up", "lora_down", "lora_mid", "alpha", "scale"})


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Low-rank update of one layer.

    Attributes:
        up: (out, rank), any floating dtype.
        down: (rank, in) or (rank, in, kh, kw), any floating dtype; Tucker's core is folded in already.
        scale: alpha / rank, or what the file's own `scale` tensor says.

    Raises:
        AdapterError: If the two share no rank, or are not two matrices.
    """

    up: Tensor
    down: Tensor
    scale: float

    algorithm = "LoRA"

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim not in (2, 4) or self.up.shape[1] != self.down.shape[0]:
            raise AdapterError(f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} share no rank")
        if not math.isfinite(self.scale):
            raise AdapterError(f"the scale alpha / rank is {self.scale}")

    @property
    def rank(self) -> int:
        """Number of columns of `up`."""
        return self.up.shape[1]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether ΔW fills a weight of (out, in) or (out, in, kh, kw); a 1x1 convolution and a Linear are alike."""
        return self.up.shape[0] == shape[0] and math.prod(self.down.shape[1:]) == math.prod(shape[1:])

    def shape_text(self) -> str:
        """ΔW's shape, such as ``(320, 768)``."""
        return str((self.up.shape[0], *self.down.shape[1:]))

    def bound(self) -> float:
        """|scale| · ‖up‖ · ‖down‖ (Frobenius) ≥ max |ΔW|, by Cauchy and Schwarz."""
        return self._bound

    @cached_property
    def _bound(self) -> float:
        return abs(self.scale) * _norm(self.up) * _norm(self.down)

    def factors(self) -> Factors:
        """(out, rank) and (rank, in·kh·kw), views in the file's dtype."""
        return Factors(self.up, self.down.flatten(1), self.scale)

    def sliced(self, rank: int) -> LoraAdapter:
        """The first `rank` ranks at the scale of the whole: what the WebUI's ``dyn`` argument does."""
        return replace(self, up=self.up[:, :rank], down=self.down[:rank])

    def delta_weight(self, base: Tensor) -> Tensor:
        """ΔW in float32, of the shape and on the device of `base`."""
        up, down, scale = self.factors()
        up = up.to(base.device, torch.float32) * scale
        return (up @ down.to(base.device, torch.float32)).reshape(base.shape)


def _norm(factor: Tensor) -> float:
    """Frobenius norm, summed in float32."""
    linalg: Any = torch.linalg  # has no types
    return linalg.vector_norm(factor, dtype=torch.float32).item()


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
    up, down = _matrix(tensors["lora_up"]), tensors["lora_down"]
    rank = down.shape[0] if down.ndim else 0
    if rank == 0 or up.shape[1] == 0:
        raise AdapterError(f"rank 0: up {tuple(up.shape)}, down {tuple(down.shape)}")
    if "lora_mid" in tensors:
        down = _fold_core(tensors["lora_mid"], down)
    return LoraAdapter(up, down, _scale(tensors, rank, default_alpha))


def _matrix(up: Tensor) -> Tensor:
    """(out, rank, 1, 1) or (out, rank) as (out, rank)."""
    if up.ndim == 4 and up.shape[2:] == (1, 1):
        return up.flatten(1)
    if up.ndim == 2:
        return up
    raise AdapterError(f"up has the shape {tuple(up.shape)}; (out, rank) or (out, rank, 1, 1) was expected")


def _fold_core(mid: Tensor, down: Tensor) -> Tensor:
    """Tucker's core times down: (rank, rank, kh, kw) and (rank, in[, 1, 1]) → (rank, in, kh, kw), float32."""
    if mid.ndim != 4 or down.flatten(1).shape[0] != mid.shape[1]:
        raise AdapterError(f"mid {tuple(mid.shape)} and down {tuple(down.shape)} share no rank")
    return torch.einsum("pqhw,qi->pihw", mid.float(), down.flatten(1).float()).contiguous()


def _scale(tensors: Mapping[str, Tensor], rank: int, default_alpha: float | None) -> float:
    """The file's own scale, else alpha / rank, else 1."""
    if "scale" in tensors:
        return _number(tensors["scale"], "scale")
    if "alpha" in tensors:
        return _number(tensors["alpha"], "alpha") / rank
    return 1.0 if default_alpha is None else default_alpha / rank


def _number(tensor: Tensor, role: str) -> float:
    if tensor.shape not in ((), (1,)):
        raise AdapterError(f"{role} is a tensor of shape {tuple(tensor.shape)}, not one number")
    if not math.isfinite(value := tensor.float().item()):
        raise AdapterError(f"{role} is {value}, not a finite number")
    return value
