"""How far a job of several stages is, so that the time it has taken foretells what it will take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib_lora.core.saving import Progress


class Work:
    """Tells one `progress` of all stages of a job, in units of a byte that is read, hashed or written."""

    def __init__(self, progress: Progress) -> None:
        """Nothing is done, which `progress` is told; what it raises ends the job."""
        self._progress = progress
        self._total = self._done = 0
        self.tick()

    def tick(self) -> None:
        """Give `progress` an occasion to end the job."""
        self._progress(self._done, max(1, self._total))

    def expect(self, units: int) -> None:
        """There is more to do, or less."""
        self._total += units

    def add(self, units: int) -> None:
        """So much more is done."""
        self._done += units
        self.tick()

    def stage(self, units: int) -> Progress:
        """The `progress` of a stage that takes so many units in all."""
        before = self._done

        def told(done: int, total: int) -> None:
            self._done = before + (units * done // total if total else units)
            self.tick()

        return told
