"""What a step of the training gets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_TENSORS = ("weights", "time_ids", "network_multipliers", "pixels", "latents")


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As `torch.stack`, of tensors on the CPU that have a dimension, in this thread.

    torch would start as many threads as there are processors, again in each thread that reads pictures.
    """
    content = np.stack([tensor.contiguous().view(torch.uint8).numpy() for tensor in tensors])
    return torch.from_numpy(content).view(tensors[0].dtype)


@dataclass(frozen=True)
class Batch:
    """Pictures of one size, with their captions; N of them.

    Attributes:
        step: From 0, over all epochs.
        epoch: From 0.
        names: Of the pictures.
        captions: As they are at this step: dropped, shuffled.
        places: For each, how many places of the training were before it, in all processes; what is left to chance
            depends on it.
        weights: (N,) float32: each picture's loss is multiplied by it before the mean over N is taken. It has
            `prior_loss_weight` in it, and makes the mean over all processes that of the batch, 0 for what fills up.
        network_multipliers: (N,) float32: strength of the network while each picture is learned; None where it is 1 for
            all pictures of the set.
        time_ids: (N, 6) int64, what SDXL is told: height and width of the original, top and left of the crop, height
            and width of the bucket. The crop is that of the scaled picture, as in SDXL's paper and diffusers' script;
            kohya tells how far the uncropped picture would be from the bucket's borders.
        pixels: (N, 3, H, W) float32 from -1 to 1; None where latents are cached.
        latents: (N, C, h, w) as they were encoded; None where they are not cached.
        texts: What the tokenizer or the cache of texts made of the captions, by name, N first.
    """

    step: int
    epoch: int
    names: tuple[str, ...]
    captions: tuple[str, ...]
    places: tuple[int, ...]
    weights: Tensor
    time_ids: Tensor
    network_multipliers: Tensor | None = None
    pixels: Tensor | None = None
    latents: Tensor | None = None
    texts: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        texts = {name: tensor.to(device, non_blocking=True) for name, tensor in self.texts.items()}
        return replace(self, **moved, texts=texts)

    def _tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}
