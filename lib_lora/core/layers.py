"""A place where a LoRA can act: one layer of a live model or of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

MASTERS = {"weight": "fp16_weight", "bias": "fp16_bias"}
"""Where the WebUI keeps the fp16 numbers of a parameter that it stores in fp8, if it is told to keep them."""

LATENT_CHANNELS = 4
INPAINTING_CHANNELS = 9
"""The latents, the mask, and the masked picture's latents."""


@dataclass(frozen=True, eq=False)
class LayerRef:
    """One layer's weight or bias, or the row slice of a fused one that is one layer to a LoRA.

    Two references are equal only if they are the same object; a KeyMap holds one for each layer.

    Attributes:
        key: Canonical dotted name, component first, such as
            ``unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q``.
        component: ``unet``, ``te1``, ``te2``, ``controlnet``, ….
        block: Block weight name: ``BASE``, ``IN00`` to ``IN11``, ``M00``, ``OUT00`` to ``OUT11``, or ``""``
            for layers outside of all blocks (time embedding, label embedding, output head).
        shape: After the row slice: (out, in), (out, in, kh, kw), or (out,) of a bias or a norm.
        parameter: Name of the weight in its component (live) or its key (checkpoint).
        rows: First and last + 1 row in a fused weight, or None for the whole weight.
        module: The module that owns the parameter, or None in a checkpoint.
        attribute: Name of the parameter on `module`: ``weight`` or ``bias``, or a MultiheadAttention's
            ``in_proj_weight`` or ``in_proj_bias``.
        original: Dotted path in its component as the original library spells it, or diffusers where that has no name.
    """

    key: str
    component: str
    block: str
    shape: tuple[int, ...]
    parameter: str
    rows: tuple[int, int] | None = None
    module: nn.Module | None = None
    attribute: str = "weight"
    original: str = ""

    @property
    def narrow_shape(self) -> tuple[int, ...] | None:
        """Shape of the same layer in a model that does not inpaint, where it is another: of its first convolution."""
        if self.key == "unet.conv_in" and self.shape[1:2] == (INPAINTING_CHANNELS,):
            return (self.shape[0], LATENT_CHANNELS, *self.shape[2:])
        return None

    def weight(self) -> Tensor:
        """The whole live parameter this layer is in (not sliced).

        Raises:
            LookupError: If the layer belongs to a checkpoint, not to a live model.
        """
        if self.module is None:
            raise LookupError(f"{self.key} is a place in a checkpoint, it has no live weight")
        return getattr(self.module, self.attribute)

    def live(self) -> Tensor:
        """This layer's own part of the live weight, a view that writes go through, of `shape`."""
        weight = self.weight().detach()
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]

    def master(self) -> Tensor | None:
        """A wider copy of the untouched fp8 weight that the model keeps, or None; of `shape`, not to be written to."""
        master = getattr(self.module, MASTERS.get(self.attribute, ""), None)
        if master is None or not is_fp8(self.weight().dtype):
            return None
        return master.detach() if self.rows is None else master.detach()[self.rows[0] : self.rows[1]]

    @property
    def is_rewritable(self) -> bool:
        """Whether the live weight holds plain floating numbers; quantised ones are packed or of another class."""
        weight = self.weight()
        plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()
        return plain and (weight if self.rows is None else self.live()).shape == self.shape


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether numbers of this type are kept, not computed with."""
    return dtype.is_floating_point and dtype.itemsize == 1
