"""Jobs that begin with each choice in a list: the last choice counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lib_lora.core.saving import Progress
    from lib_lora.ui.jobs import JobState, Slot

T = TypeVar("T")


class Latest:
    """What a choice starts; the job of the choice before is cancelled, and not spoken of any more."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._newest = object()

    def run(self, work: Callable[[Progress], T]) -> Iterator[JobState[T] | None]:
        """How far the job is, until its end; None once there is a newer choice."""
        self._slot.cancel()
        mine = self._newest = object()
        for state in self._slot.run(work):
            yield state if self._newest is mine else None
