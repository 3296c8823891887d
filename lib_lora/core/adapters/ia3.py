"""IA3: ΔW = W0 · w, one number for each input or each output of a layer.

Sources: Liu et al. 2022 (arXiv 2205.05638); LyCORIS `modules/ia3.py` (``weight``, ``on_input``: a change, 0 at first);
PEFT `tuners/ia3` (``ia3_l``: a factor, 1 at first; of outputs it scales the bias too).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lib_lora.core.adapters.base import DenseAdapter, check_rank, matrix, number, peak, wide
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.core.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Ia3Adapter(DenseAdapter):
    """A factor for each channel.

    Attributes:
        weight: (channels,), any floating dtype; 0 changes nothing.
        on_input: Whether the channels are the layer's inputs.
        scales_bias: Whether a layer's bias is scaled with its outputs.
    """

    weight: Tensor
    on_input: bool
    scales_bias: bool = False

    algorithm = "IA3"
    needs_base = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Not told: only one of the two sides is known."""
        return ()

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the layer has as many channels on that side."""
        side = int(self.on_input)
        return len(shape) > side and shape[side] == len(self.weight)

    def shape_text(self) -> str:
        """The number of channels."""
        return f"{len(self.weight)} {'inputs' if self.on_input else 'outputs'}"

    def bound(self, base_peak: float = 1.0) -> float:
        """Largest factor times the largest weight."""
        return self._peak * base_peak

    @cached_property
    def _peak(self) -> float:
        return peak(self.weight)

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Add to the total: factor · W0[rows] · w, in one pass."""
        weight, part = wide(self.weight, total), wide(matrix(base[rows]), total)
        if not self.on_input:
            total.addcmul_(part, weight[rows, None].expand_as(part), value=factor)
            return
        cells = (len(total), len(weight), -1)
        total.view(cells).addcmul_(part.view(cells), weight[None, :, None], value=factor)


def load(tensors: Mapping[str, Tensor], default_alpha: float | None) -> Ia3Adapter | None:
    """Read ``weight`` (channels,) or (1, channels, 1, 1) with ``on_input``, or PEFT's ``ia3_l``.

    PEFT's vector lies along the side it scales: (1, in) inputs, (out, 1) outputs. A convolution's is
    (1, channels, 1, 1) in either case, and is taken as the outputs'.

    Raises:
        AdapterError: If it is no vector, or `on_input` is no number.
    """
    roles = tensors.keys() - {"alpha"}
    if roles == {"ia3_l"}:
        factor = tensors["ia3_l"]
        weight, on_input = factor.float() - 1, factor.ndim == 2 and factor.shape[0] == 1
    elif roles == {"weight", "on_input"}:
        weight, on_input = tensors["weight"], bool(number(tensors["on_input"], "on_input"))
    else:
        return None
    check_rank(weight)
    if max(weight.shape, default=0) != weight.numel():
        raise AdapterError(f"the factors have the shape {tuple(weight.shape)}, one for each channel was expected")
    return Ia3Adapter(weight.flatten(), on_input, scales_bias="ia3_l" in tensors and not on_input)
