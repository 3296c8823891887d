"""Strengths that move while a picture is made: what a pass asks of them, and how each is brought into the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from lib_lora.core.adapters import is_low_rank
from lib_lora.core.division import takes_hooks
from lib_lora.core.held import takes_products
from lib_lora.core.layers import is_fp8
from lib_lora.core.memory import free_bytes
from lib_lora.core.ways import EXACT, FEW_MOVES, Load, Movement, Ways, choose, rates_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.layers import LayerRef
    from lib_lora.core.ways import Way
    from lib_lora.resolve import ResolvedLora


@dataclass(frozen=True)
class Future:
    """What the rest of a pass asks of one network.

    Attributes:
        loras: Its entries in the request; one that is named twice has two.
        moves: The steps at which a strength of the UNet changes.
        active: At how many steps it is not 0.
    """

    loras: tuple[ResolvedLora, ...]
    moves: tuple[int, ...]
    active: int

    @property
    def layers(self) -> list[tuple[LayerRef, WeightAdapter]]:
        """Where its strength moves: text encoders are done before step 0, and a block weight may be 0."""
        scales = [lora.scale.layers for lora in self.loras]
        return [
            (layer, adapter)
            for layer, adapter in self.loras[0].match.layers
            if not layer.component.startswith("te") and any(scale.get(layer.key, 1.0) for scale in scales)
        ]


@dataclass(frozen=True)
class Course:
    """The rest of a pass.

    Attributes:
        steps: How many the whole pass has.
        last: The step of the last move.
        ways: How the LoRAs that move are brought into the model.
        futures: `Network.uid` → what is asked of it, of those that move.
    """

    steps: int
    last: int = -1
    ways: Ways = EXACT
    futures: Mapping[str, Future] = field(default_factory=dict[str, Future])

    def told(self, ways: Ways) -> dict[str, str]:
        """Name of a LoRA → how it is moved, a clause.

        Args:
            ways: What came of the ones that were chosen.
        """
        return {
            lora.request.name: _clause(future, uid, ways)
            for uid, future in self.futures.items()
            for lora in future.loras
        }


def plan_course(loras: Sequence[ResolvedLora], step: int, steps: int, *, fused: bool, may_hook: bool) -> Course:
    """Look ahead from a step, and choose how to move.

    Args:
        loras: With the strengths of the step before.
        step: The first that is looked at.
        steps: Of the pass.
        fused: Whether weights are written, summed and rounded once; else there is nothing to choose.
        may_hook: Whether forwards may be hooked too.
    """
    groups: dict[str, list[ResolvedLora]] = {}
    for lora in loras:
        groups.setdefault(lora.network.uid, []).append(lora)
    futures = {uid: _future(tuple(group), step, steps) for uid, group in groups.items()}
    moving = {uid: future for uid, future in futures.items() if future.moves}
    last = max((future.moves[-1] for future in moving.values()), default=-1)
    ways = _choose_ways(futures, may_hook) if fused else EXACT
    return Course(steps, last, ways, moving)


def holdable(pairs: Iterable[tuple[LayerRef, WeightAdapter]]) -> set[str]:
    """Keys of the layers where all of these adapters can be added to the held, rounded sum of others.

    Not where the weights are fp8 or can not be rewritten, and not where a change depends on the weight.
    """
    can = {True: set[str](), False: set[str]()}
    for layer, adapter in pairs:
        can[_can_hold(layer, adapter)].add(layer.key)
    return can[True] - can[False]


def _can_hold(layer: LayerRef, adapter: WeightAdapter) -> bool:
    return not adapter.needs_base and layer.is_rewritable and not is_fp8(layer.weight().dtype)


def _future(loras: tuple[ResolvedLora, ...], step: int, steps: int) -> Future:
    ahead = [tuple(lora.request.strengths(at, steps)[1] for lora in loras) for at in range(step, steps)]
    before = tuple(lora.scale.unet for lora in loras)
    moves = tuple(step + index for index, (one, other) in enumerate(pairwise([before, *ahead])) if one != other)
    return Future(loras, moves, sum(any(strengths) for strengths in ahead))


def _choose_ways(futures: Mapping[str, Future], may_hook: bool) -> Ways:
    """Each network's way, beside those that stay."""
    others: dict[str, int] = {}
    restless = {uid: future for uid, future in futures.items() if len(future.moves) > FEW_MOVES}
    for future in (future for uid, future in futures.items() if uid not in restless):
        for layer, adapter in future.layers:
            others[layer.key] = others.get(layer.key, 0) + adapter.rank
    places: dict[Way, dict[str, set[str]]] = {"exact": {}, "held": {}, "hooked": {}}
    for uid, future in restless.items():
        place = places[_way(future, others, may_hook, alone=len(restless) == 1)]
        for layer, _ in future.layers:
            place.setdefault(layer.key, set()).add(uid)
    can_hold = holdable(pair for future in restless.values() for pair in future.layers)
    held = {key: frozenset(uids) for key, uids in places["held"].items() if key in can_hold}
    return Ways(held, {key: frozenset(uids) for key, uids in places["hooked"].items()})


def _way(future: Future, others: Mapping[str, int], may_hook: bool, *, alone: bool) -> Way:
    pairs = future.layers
    if not pairs:
        return "exact"
    loads = [_load(layer, adapter, others.get(layer.key, 0), alone=alone) for layer, adapter in pairs]
    weight = pairs[0][0].weight()
    movement = Movement(
        moves=len(future.moves),
        active=future.active,
        is_fused=any(lora.scale.unet for lora in future.loras),
        loads=loads,
        can_hook=may_hook and all(is_low_rank(adapter) and takes_hooks(layer) for layer, adapter in pairs),
        free_bytes=free_bytes(weight.device),
    )
    return choose(movement, rates_of(weight.device.type, weight.dtype))


def _load(layer: LayerRef, adapter: WeightAdapter, others: int, *, alone: bool) -> Load:
    elements, rows, weight = math.prod(layer.shape), layer.shape[0], layer.weight()
    return Load(
        elements=elements,
        itemsize=weight.element_size(),
        edge=rows + elements // rows,
        rank=adapter.rank,
        others=others,
        can_hold=_can_hold(layer, adapter),
        can_keep=alone and takes_products(weight),
    )


def _clause(future: Future, uid: str, ways: Ways) -> str:
    moves = f"{len(future.moves)} move{'s' * (len(future.moves) != 1)}"
    how = {
        "exact": "fused anew",
        "held": "added to the held sum of the others",
        "hooked": f"hooked, for it acts in {future.active} steps",
    }
    return f"{moves}, {how[ways.way(uid)]}"
