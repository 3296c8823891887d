"""The sums of LoRAs that stay, kept while others move: `LayerPatch.held`, rounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lib_lora.core.numerics import Term, prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.plan import FusePlan, LayerPatch, PatchKey


@dataclass(frozen=True, eq=False)
class Held:
    """One layer's sum.

    Attributes:
        key: What is in it.
        weight: Of the layer's own dtype and shape.
        prepared: Adapter that moves → the same, its factors as the kernel takes them.
    """

    key: PatchKey
    weight: Tensor
    prepared: dict[WeightAdapter, WeightAdapter] = field(default_factory=dict["WeightAdapter", "WeightAdapter"])


class HeldSums:
    """Layer key → its sum; empty between passes."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the sums."""
        return sum(held.weight.numel() * held.weight.element_size() for held in self._held.values())

    def keep(self, plan: FusePlan) -> None:
        """Free the sums that the plan does not add to."""
        wanted = {key: patch.held.key for key, patch in plan.patches.items() if patch.held is not None}
        self._held = {key: held for key, held in self._held.items() if wanted.get(key) == held.key}

    def add(self, patches: Sequence[LayerPatch], fill: Callable[[LayerPatch, Tensor], None]) -> None:
        """Compute the sums that these patches need and that are not here.

        Args:
            patches: What is written next.
            fill: Writes the sum of a `LayerPatch.held` into a tensor.
        """
        new = [patch for patch in patches if patch.held is not None and patch.layer.key not in self._held]
        for patch, weight in zip(new, _alike([patch.layer.live() for patch in new]), strict=True):
            if patch.held is not None:
                fill(patch.held, weight)
                self._held[patch.layer.key] = Held(patch.held.key, weight)

    def start(self, patch: LayerPatch, like: Tensor) -> Tensor:
        """The sum that a patch's terms are added to, on the device of `like`."""
        return self._held[patch.layer.key].weight.to(like.device)

    def terms(self, patch: LayerPatch, out: Tensor) -> Sequence[Term]:
        """What is added; the factors of one alone are converted once, not at each move."""
        if len(patch.terms) != 1:
            return patch.terms
        (adapter, factor), known = patch.terms[0], self._held[patch.layer.key].prepared
        if adapter not in known:
            known[adapter] = prepared(adapter, out)
        return (Term(known[adapter], factor),)

    def forget(self, key: str) -> None:
        """Free one."""
        self._held.pop(key, None)

    def clear(self) -> None:
        """Free all."""
        self._held.clear()


def _alike(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """An empty tensor for each, all cut from one block: the system hands out one large block faster than many."""
    blocks: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        if kind not in blocks:
            total = sum(other.numel() for other in tensors if (other.dtype, other.device) == kind)
            blocks[kind] = torch.empty(total, dtype=tensor.dtype, device=tensor.device)
        piece, blocks[kind] = blocks[kind].tensor_split([tensor.numel()])
        yield piece.view(tensor.shape)
