"""What is kept while strengths move: the sums of LoRAs that stay, `LayerPatch.held`, and the product that is added.

A sum is rounded to the weight's dtype. On a CPU the product of the one LoRA that moves is kept beside it, rounded too,
where memory is free for it: a move then reads both and writes the weight, which takes half as long as the product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lib_lora.core import numerics
from lib_lora.core.adapters import is_low_rank
from lib_lora.core.memory import free_bytes
from lib_lora.core.numerics import Term

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.plan import FusePlan, LayerPatch, PatchKey
    from lib_lora.core.workspace import Workspace


@dataclass(eq=False)
class Held:
    """One layer's sum.

    Attributes:
        key: What is in it.
        weight: Of the layer's own dtype and shape.
        product: Room for the ΔW of one that moves, of the same dtype and shape, or None.
    """

    key: PatchKey
    weight: Tensor
    product: Tensor | None
    _multiplied: WeightAdapter | None = None
    _prepared: dict[WeightAdapter, WeightAdapter] = field(default_factory=dict["WeightAdapter", "WeightAdapter"])

    @property
    def nbytes(self) -> int:
        """Memory of the sum and the product."""
        return self.weight.nbytes * (1 if self.product is None else 2)

    def fuse(self, terms: Sequence[Term], out: Tensor, workspace: Workspace) -> None:
        """Write the sum and these terms, added and rounded, to `out`."""
        product = self._product_of(terms, out, workspace)
        if product is None:
            numerics.fuse_layer(self.weight.to(out.device), self._ready(terms, out), out, workspace)
        else:  # torch.add would round the factor to the dtype of the weights
            one = torch.ones((), dtype=out.dtype)
            torch.addcmul(self.weight, product, one, value=terms[0].factor, out=out)

    def _product_of(self, terms: Sequence[Term], out: Tensor, workspace: Workspace) -> Tensor | None:
        """ΔW of the only term, where there is room for it and it stays finite at strength 1."""
        product = self.product
        if product is None or product.device != out.device or len(terms) != 1:
            return None
        whole = Term(terms[0].adapter, 1.0)
        if self._multiplied is not whole.adapter:
            if not numerics.is_finite_for_sure([whole], 0.0, out.dtype):
                return None
            self._multiplied = None
            multiply(whole, product, workspace)
            self._multiplied = whole.adapter
        return product

    def _ready(self, terms: Sequence[Term], out: Tensor) -> Sequence[Term]:
        """The factors of one alone are converted once, not at each move."""
        if len(terms) != 1:
            return terms
        ((adapter, factor),) = terms
        if adapter not in self._prepared:
            self._prepared[adapter] = numerics.prepared(adapter, out)
        return [Term(self._prepared[adapter], factor)]


class HeldSums:
    """Layer key → its sum; empty between passes."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}

    @property
    def nbytes(self) -> int:
        """Memory of all."""
        return sum(held.nbytes for held in self._held.values())

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
        weights = [patch.layer.live() for patch in new]
        rooms = _alike(weights) if _have_room(new) else [None] * len(new)
        for patch, weight, room in zip(new, _alike(weights), rooms, strict=True):
            if patch.held is not None:
                fill(patch.held, weight)
                self._held[patch.layer.key] = Held(patch.held.key, weight, room)

    def start(self, patch: LayerPatch, like: Tensor) -> Tensor:
        """The sum that a patch's terms are added to, on the device of `like`."""
        return self._held[patch.layer.key].weight.to(like.device)

    def fuse(self, patch: LayerPatch, out: Tensor, workspace: Workspace) -> None:
        """Write the sum and a patch's terms, added and rounded, to `out`."""
        self._held[patch.layer.key].fuse(patch.terms, out, workspace)

    def forget(self, key: str) -> None:
        """Free one."""
        self._held.pop(key, None)

    def clear(self) -> None:
        """Free all."""
        self._held.clear()


def takes_products(weight: Tensor) -> bool:
    """Whether a product is read faster than it is made, and torch adds its multiple in float32.

    A GPU's memory is slow beside its GEMMs. fp16 has a narrow range, and torch 2.1 multiplies in it.
    """
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


def _have_room(patches: Sequence[LayerPatch]) -> bool:
    """Whether one term moves at a time, and sums and products of these weights fit the memory that is free."""
    weights = [patch.layer.live() for patch in patches]
    if not weights or any(len(patch.terms) > 1 for patch in patches) or not all(map(takes_products, weights)):
        return False
    free = free_bytes(weights[0].device)
    return free is None or 2 * sum(weight.nbytes for weight in weights) <= free


def multiply(term: Term, out: Tensor, workspace: Workspace) -> None:
    """Write factor · ΔW, rounded, to `out`."""
    if is_low_rank(term.adapter) and numerics.has_native_gemm(out.dtype, out.device.type):
        up, down, gain = numerics.stack([term], out.dtype, out.device, workspace)
        product = out.flatten(1)
        torch.addmm(product, up, down, beta=0, alpha=gain, out=product)
    else:
        nothing = torch.zeros((), dtype=torch.float32, device=out.device).expand(out.shape)
        numerics.fuse_layer(nothing, [term], out, workspace)


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
