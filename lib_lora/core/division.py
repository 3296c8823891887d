"""Which part of a plan is fused into weights, and which is added to forwards."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.core.adapters import split_linear
from lib_lora.core.hooks import is_hookable, is_wrapped
from lib_lora.core.numerics import Term
from lib_lora.core.plan import FusePlan, LayerPatch
from lib_lora.core.ways import EXACT
from lib_lora.errors import UnwritableError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lib_lora.core.layers import LayerRef
    from lib_lora.core.network import Network
    from lib_lora.core.ways import Ways


@dataclass(frozen=True)
class Division:
    """A plan in two: what is written into the weights, and what is added to the forwards.

    Attributes:
        fused: For the patcher.
        hooked: For `HookedLayers`.
        notes: Sentences about what is not done in the way that was asked for.
    """

    fused: FusePlan
    hooked: FusePlan
    notes: tuple[str, ...] = ()


def divide(plan: FusePlan, hook: bool, ways: Ways = EXACT) -> Division:
    """Decide for each layer whether it is fused or hooked.

    Layers whose weights can not be rewritten (quantised) are hooked in either mode. Algorithms whose ΔW depends on the
    weight (IA3, OFT, BOFT, DoRA, GLoRA's first branch), biases, MultiheadAttention and layers whose forward other code
    has wrapped are fused in either mode.

    Args:
        plan: The whole.
        hook: Whether the user asks for hooks.
        ways: What is set apart of layers that are fused.

    Raises:
        UnwritableError: If an algorithm that must be fused meets a weight that can not be rewritten.
    """
    fused: dict[str, LayerPatch] = {}
    hooked: dict[str, LayerPatch] = {}
    quantised: list[LayerPatch] = []
    kept: dict[str, None] = {}
    for key, patch in plan.patches.items():
        writable = patch.layer.is_rewritable
        if writable and not (hook and takes_hooks(patch.layer)):
            inside, beside = _apart(patch, ways.hooked.get(key, ()) if takes_hooks(patch.layer) else ())
            if beside:
                hooked[key] = beside
            if inside:
                fused[key] = _held(inside, ways.held[key]) if key in ways.held else inside
            continue
        linear, rest = _split(patch)
        if linear:
            hooked[key] = linear
        if rest and not writable:
            raise _unwritable(rest)
        if rest:
            fused[key] = rest
            kept.update((f"{network.name}: {term.adapter.algorithm}", None) for term, network in _pairs(rest))
        if not writable:
            quantised.append(patch)
    if not hooked and all(map(operator.is_, fused.values(), plan.patches.values())):
        return Division(plan, FusePlan({}))
    notes = tuple(f"{what} depends on the weights and is fused in hook mode too" for what in kept)
    return Division(FusePlan(fused, plan.compat), FusePlan(hooked, plan.compat), notes + _quantised_note(quantised))


def takes_hooks(layer: LayerRef) -> bool:
    """Whether an update of the layer can be added to its forward, and means the same there."""
    return is_hookable(layer) and not is_wrapped(layer)


def _held(patch: LayerPatch, moving: Collection[str]) -> LayerPatch:
    """The same patch, its terms that move set apart from those that stay."""
    stays, moves = _apart(patch, moving)
    if stays is None:
        return patch
    return LayerPatch(patch.layer, moves.terms if moves else (), moves.networks if moves else (), stays)


def _apart(patch: LayerPatch, uids: Collection[str]) -> tuple[LayerPatch | None, LayerPatch | None]:
    """The terms of other networks, and those of these."""
    if not uids:
        return patch, None
    groups = [[pair for pair in _pairs(patch) if (pair[1].uid in uids) is chosen] for chosen in (False, True)]
    return _joined(patch.layer, groups[0]), _joined(patch.layer, groups[1])


def _pairs(patch: LayerPatch) -> Sequence[tuple[Term, Network]]:
    return list(zip(patch.terms, patch.networks, strict=True))


def _split(patch: LayerPatch) -> tuple[LayerPatch | None, LayerPatch | None]:
    """What can be added to the layer's forward, and what needs its weight."""
    linear: list[tuple[Term, Network]] = []
    rest: list[tuple[Term, Network]] = []
    for term, network in _pairs(patch):
        parts = split_linear(term.adapter) if is_hookable(patch.layer) else (None, term.adapter)
        for part, group in zip(parts, (linear, rest), strict=True):
            if part is not None:
                group.append((Term(part, term.factor), network))
    return _joined(patch.layer, linear), _joined(patch.layer, rest)


def _joined(layer: LayerRef, pairs: Sequence[tuple[Term, Network]]) -> LayerPatch | None:
    if not pairs:
        return None
    terms, networks = zip(*pairs, strict=True)
    return LayerPatch(layer, terms, networks)


def _unwritable(patch: LayerPatch) -> UnwritableError:
    term, network = patch.terms[0], patch.networks[0]
    kind = type(patch.layer.module).__name__
    return UnwritableError(
        f"{network.name}: {term.adapter.algorithm} has to change the weights of {patch.layer.key}, which are quantised "
        f"({kind}) and can not be rewritten; load the model in fp16 or fp8 for this LoRA",
        network=network.uid,
    )


def _quantised_note(patches: Sequence[LayerPatch]) -> tuple[str, ...]:
    kinds = ", ".join(dict.fromkeys(type(patch.layer.module).__name__ for patch in patches))
    return (f"{len(patches)} layers are quantised ({kinds}) and are hooked, not fused",) if patches else ()
