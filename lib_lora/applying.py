"""From LoRAs that were found to a changed model: into its weights, and beside those that can not be written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lib_lora.core.division import divide
from lib_lora.core.hooks import HookedLayers
from lib_lora.core.memory import OUT_OF_MEMORY
from lib_lora.core.patch_state import ApplyReport
from lib_lora.core.ways import EXACT, Ways
from lib_lora.errors import FuseMemoryError, NetworkError
from lib_lora.moving import Course
from lib_lora.report import RefusedLora

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lib_lora.core.layers import LayerRef
    from lib_lora.core.patcher import ModelPatcher
    from lib_lora.core.plan import FusePlan
    from lib_lora.report import SessionReport
    from lib_lora.resolve import ResolvedLora


class Applier:
    """Writes plans, and tells who listens.

    Attributes:
        patcher: Writes weights.
        hooks: Add to forwards.
        course: What the pass that runs asks.
        ways: How LoRAs that move are kept apart from those that stay.
    """

    def __init__(self, patcher: ModelPatcher, on_weights_changed: Callable[[Sequence[LayerRef]], None] | None) -> None:
        self.patcher = patcher
        self.hooks = HookedLayers()
        self.course = Course(0)
        self.ways: Ways = EXACT
        self._on_weights_changed = on_weights_changed

    @property
    def key(self) -> str:
        """Names everything that decides the weights now."""
        return "|".join(filter(None, (self.patcher.applied_key, self.hooks.applied_key)))

    def follow(self, course: Course) -> None:
        """Bring LoRAs into the model as this pass asks."""
        self.course, self.ways = course, course.ways

    def tell_of_move(self, report: SessionReport, step: int) -> SessionReport:
        """Write into a report how its LoRAs were moved; after the last move, free what was held for it."""
        moving = self.course.told(self.ways)
        held_bytes = max(report.held_bytes, self.patcher.held_bytes)
        if step >= self.course.last:
            self.patcher.drop_held()
        applied = tuple(replace(lora, moving=moving.get(lora.name, "")) for lora in report.applied)
        return replace(report, applied=applied, held_bytes=held_bytes)

    def apply(
        self,
        loras: list[ResolvedLora],
        refused: list[RefusedLora],
        make_plan: Callable[[list[ResolvedLora]], FusePlan],
        *,
        hook: bool,
    ) -> tuple[FusePlan, list[ApplyReport]]:
        """Plan and write. A LoRA that would overflow a weight leaves `loras`, and the rest is planned again.

        Where a way other than the exact one fails, that one is taken from then on.

        Raises:
            ApplyError: Writing failed; `restore` is to be called, unless it is a ForeignWriteError.
        """
        notes: tuple[str, ...] = ()
        while True:
            plan = make_plan(loras)
            try:
                parts = divide(plan, hook, self.ways)
                done = [
                    self.patcher.apply(parts.fused),
                    self.hooks.apply(parts.hooked),
                    ApplyReport(notes=(*parts.notes, *notes)),
                ]
            except (FuseMemoryError, *OUT_OF_MEMORY, NetworkError) as error:
                if self.ways != EXACT:
                    self.ways = EXACT
                    notes = (f"LoRAs that move are fused anew with all others at each move, for {error}",)
                    continue
                if not isinstance(error, NetworkError):
                    raise
                culprits = [lora for lora in loras if lora.network.uid == error.network]
                if not culprits:
                    raise
                refused.extend(RefusedLora(lora.request.name, str(error)) for lora in culprits)
                loras[:] = [lora for lora in loras if lora not in culprits]
            else:
                self.tell([layer for report in done for layer in (*report.written, *report.restored)])
                return plan, done

    def restore(self) -> None:
        """No hooks, base weights back."""
        self.hooks.clear()
        self.patcher.restore()

    def tell(self, layers: Sequence[LayerRef]) -> None:
        """Weights of `layers` were written."""
        if layers and self._on_weights_changed is not None:
            self._on_weights_changed(layers)
