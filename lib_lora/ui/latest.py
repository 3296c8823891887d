"""Jobs that begin with each choice in a list, and questions that a form asks with each change: the last one counts."""

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


class LastAnswer:
    """Of questions that may be answered in any order, the answer to the last. To be kept in a ``gr.State``."""

    def __init__(self) -> None:
        self._newest: object = None

    def of(self, question: Callable[[], T]) -> T | None:
        """The answer; None if another question came meanwhile."""
        mine = self._newest = object()
        answer = question()
        return answer if self._newest is mine else None
