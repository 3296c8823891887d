"""DoRA: a LoRA's direction at a trained length: W = m · V / ‖V‖ with V = W0 + ΔW of the adapter inside.

The length is that of each output's row or of each input's column, as the shape of the magnitudes says. At strength s
the layer is W0 + s · (W - W0), as in the WebUI and ComfyUI; at strength 1 it is what was trained.

Sources: Liu et al. 2024 (arXiv 2402.09353); LyCORIS `functional/general.py` (``dora_scale``) and PEFT
`tuners/lora/dora.py` (``lora_magnitude_vector``), which agree on ‖V‖.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.adapters.base import DenseAdapter, check_rank, matrix, peak, wide
from lib_lora.core.layers import is_fp8
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.core.adapters.base import WeightAdapter
    from lib_lora.core.workspace import Workspace

ROLES = ("dora_scale", "lora_magnitude_vector")
EPSILON = torch.finfo(torch.float32).eps
"""Added to a length, as LyCORIS does, so that a row of zeros stays one."""


@dataclass(frozen=True, eq=False)
class DoraAdapter(DenseAdapter):
    """An adapter inside, and magnitudes.

    Attributes:
        inner: LoRA, LoHa or LoKr.
        magnitude: (out,) or (in,), any floating dtype, as the file shapes it.
        per_output: Whether it is one for each output.
    """

    inner: WeightAdapter
    magnitude: Tensor
    per_output: bool

    needs_base = True

    @property
    def algorithm(self) -> str:
        """DoRA, and of what."""
        return f"DoRA of {self.inner.algorithm}"

    @property
    def rank(self) -> int:
        """Rank of the adapter inside."""
        return self.inner.rank

    @property
    def row_step(self) -> int:
        """The length of a column needs all rows."""
        return self.inner.row_step if self.per_output else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the adapter inside."""
        return self.inner.shape

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the adapter fits, and there is one magnitude for each output or input."""
        side = 0 if self.per_output else 1
        return len(shape) > 1 and self.inner.fits(shape) and self.magnitude.numel() == shape[side]

    def shape_text(self) -> str:
        """ΔW's shape and the number of magnitudes."""
        side = "outputs" if self.per_output else "inputs"
        return f"{self.inner.shape_text()} with magnitudes of {self.magnitude.numel()} {side}"

    def bound(self, base_peak: float = 1.0) -> float:
        """No number of V / ‖V‖ is larger than 1."""
        return peak(self.magnitude) + base_peak if math.isfinite(self.inner.bound()) else math.nan

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · (m · V / ‖V‖ - W0[rows])."""
        part = matrix(base[rows])
        direction = workspace.take("direction", (len(total), total.shape[1]), torch.float32, total.device).copy_(part)
        self.inner.add_to(direction, base, rows, 1.0, workspace)
        magnitude = wide(self.magnitude.flatten(), total)
        if self.per_output:
            direction.mul_((magnitude[rows] / _length(direction, 1))[:, None])
        else:
            cells = direction.view(len(direction), len(magnitude), -1)
            cells.mul_((magnitude / _length(cells, (0, 2)))[:, None])
        total.add_(direction, alpha=factor).sub_(wide(part, total) if is_fp8(part.dtype) else part, alpha=factor)


def _length(direction: Tensor, dim: int | tuple[int, int]) -> Tensor:
    linalg: Any = torch.linalg  # has no types
    return linalg.vector_norm(direction, dim=dim) + EPSILON


def wrap(inner: WeightAdapter, tensors: Mapping[str, Tensor]) -> WeightAdapter:
    """`inner` with the magnitudes among a layer's tensors, or as it is if there are none.

    ``dora_scale`` is (out, 1, …) or (1, in, …); ``lora_magnitude_vector`` is always of the outputs, (out,) or
    (1, out, 1, 1).

    Raises:
        AdapterError: If both are there, or what is there is no vector.
    """
    roles = [role for role in ROLES if role in tensors]
    if not roles:
        return inner
    if len(roles) > 1:
        raise AdapterError(f"{' and '.join(roles)} are two spellings of one tensor")
    magnitude = tensors[roles[0]]
    check_rank(magnitude)
    if max(magnitude.shape, default=0) != magnitude.numel():
        raise AdapterError(f"{roles[0]} has the shape {tuple(magnitude.shape)}, one for each output or input is needed")
    per_output = roles[0] != "dora_scale" or magnitude.ndim < 2 or magnitude.shape[0] == magnitude.numel()
    return DoraAdapter(inner, magnitude, per_output)
