"""What is fused into a model, as it is kept on the model itself, and what one change of it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from lib_lora.core.fingerprint import Sample
from lib_lora.core.peaks import Peaks

if TYPE_CHECKING:
    from lib_lora.core.base_store import BaseStore
    from lib_lora.core.layers import LayerRef
    from lib_lora.core.plan import Compat, PatchKey

    AppliedKey: TypeAlias = "tuple[Compat, Rounding, PatchKey]"

Rounding = Literal["nearest", "stochastic"]

STATE_ATTRIBUTE = "_prefuse_state"
DIRTY: AppliedKey = ("exact", "nearest", (("being written",), (0.0,)))


@dataclass
class PatchState:
    """What is fused into a model. It lives on the model's own modules, so it goes when they go.

    Attributes:
        store: The base weights of every layer that was ever touched.
        layers: Layer key → place, of the layers in the store.
        applied: Layer key → what is fused there now; base layers are not listed.
        samples: Layer key → sample of the weight as we left it.
        peaks: Layer key → max |W0|, of the layers that were written.
        plan_key: Key of the applied plan, ``""`` for the base.
        generation: Grows with every change of a weight.
    """

    store: BaseStore
    layers: dict[str, LayerRef] = field(default_factory=dict[str, "LayerRef"])
    applied: dict[str, AppliedKey] = field(default_factory=dict[str, "AppliedKey"])
    samples: dict[str, Sample] = field(default_factory=dict[str, Sample])
    peaks: Peaks = field(default_factory=Peaks)
    plan_key: str = ""
    generation: int = 0


@dataclass(frozen=True)
class ApplyReport:
    """What one `apply` or `restore` did.

    Attributes:
        written: Layers that were fused.
        restored: Layers that got their base back.
        milliseconds: Wall time.
        notes: Sentences for the user.
    """

    written: tuple[LayerRef, ...] = ()
    restored: tuple[LayerRef, ...] = ()
    milliseconds: float = 0.0
    notes: tuple[str, ...] = ()
