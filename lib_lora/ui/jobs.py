"""Long jobs of the page: one at a time, each with how far it is, and each can be cancelled."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from lib_lora.errors import PrefuseError
from lib_lora.hosts.guard import attempt, sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lib_lora.core.saving import Progress

T = TypeVar("T")
Phase = Literal["waiting", "running", "done", "refused", "cancelled"]
LOOK_SECONDS = 0.2
"""Between two looks at how far a job is."""


class CancelledError(PrefuseError):
    """The user does not want it any more."""


@dataclass(frozen=True)
class JobState(Generic[T]):
    """How far a job is.

    Attributes:
        phase: ``waiting`` for others, ``running``, or how it ended.
        ahead: How many jobs are before it.
        done: Of `total`.
        total: 0 as long as it is not known.
        seconds: Since it began.
        since: Of these had passed when it began to count to `total`.
        result: Of one that is ``done``.
        reason: Why it was ``refused``.
    """

    phase: Phase = "waiting"
    ahead: int = 0
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    since: float = 0.0
    result: T | None = None
    reason: str = ""

    @property
    def seconds_left(self) -> float | None:
        """Until its end, if it goes on as until now; None if that can not be said."""
        counted = self.seconds - self.since
        return counted * (self.total - self.done) / self.done if self.done and self.total else None


class Jobs:
    """The queue of a page: one job runs, the others wait."""

    def __init__(self) -> None:
        self._waiting: deque[Job[Any]] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._slots: dict[str, Slot] = {}

    def slot(self, form: str) -> Slot:
        """What a form starts and cancels: the same for each page that is made, so that a new one finds its jobs."""
        with self._changed:
            return self._slots.setdefault(form, Slot(self))

    def start(self, work: Callable[[Progress], T]) -> Job[T]:
        """Begin a job, or let it wait until those before have ended.

        Args:
            work: Gets the function that it has to call with how much of how much is done.
        """
        job = Job(work, self)
        with self._changed:
            self._waiting.append(job)
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return job

    def ahead_of(self, job: Job[Any]) -> int:
        """How many jobs have to end before this one."""
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else 0

    def _run(self, job: Job[Any]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] is job or job.is_cancelled)
        try:
            job.work()
        finally:
            with self._changed:
                self._waiting.remove(job)
                self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Cancel all jobs and let them remove what they have begun to write.

        Args:
            seconds: How long to wait for that at most.
        """
        with self._changed:
            for job in self._waiting:
                job.cancel()
            self._changed.wait_for(lambda: not self._waiting, seconds)

    def wake(self) -> None:
        """Let jobs that wait look whether they were cancelled."""
        with self._changed:
            self._changed.notify_all()


class Job(Generic[T]):
    """One job of a queue.

    Attributes:
        is_told: Whether somebody has heard how it ended.
    """

    def __init__(self, action: Callable[[Progress], T], jobs: Jobs) -> None:
        self._action = action
        self._jobs = jobs
        self._state: JobState[T] = JobState()
        self._started = 0.0
        self._cancel = threading.Event()
        self.is_told = False

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants it any more; it ends at its next word about how far it is."""
        return self._cancel.is_set()

    def cancel(self) -> None:
        """End it as soon as it says how far it is; what it has written is removed."""
        self._cancel.set()
        self._jobs.wake()

    def state(self) -> JobState[T]:
        """How far it is now."""
        state = self._state
        if state.phase == "waiting":
            return replace(state, ahead=self._jobs.ahead_of(self))
        return replace(state, seconds=time.monotonic() - self._started) if state.phase == "running" else state

    def states(self) -> Iterator[JobState[T]]:
        """How far it is, again and again, until its end."""
        while True:
            state = self.state()
            yield state
            if state.phase not in ("waiting", "running"):
                self.is_told = True
                return
            time.sleep(LOOK_SECONDS)

    def work(self) -> None:
        """Do it, in the thread of the queue."""
        self._started = time.monotonic()
        self._state = replace(self._state, phase="running")
        result, error = attempt("a job of the page", self._act)
        seconds = time.monotonic() - self._started
        if error is None:
            self._state = replace(self._state, phase="done", seconds=seconds, result=result)
        elif isinstance(error, CancelledError):
            self._state = replace(self._state, phase="cancelled", seconds=seconds)
        else:
            self._state = replace(self._state, phase="refused", seconds=seconds, reason=sentence(error))

    def _act(self) -> T:
        self._told(0, 0)
        return self._action(self._told)

    def _told(self, done: int, total: int) -> None:
        if self.is_cancelled:
            raise CancelledError("cancelled")
        begins = total != self._state.total or done < self._state.done
        since = time.monotonic() - self._started if begins else self._state.since
        self._state = replace(self._state, done=done, total=total, since=since)


class Slot:
    """What one form starts and cancels.

    Attributes:
        kept: What its jobs show of themselves before they end, as the form likes it.
    """

    def __init__(self, jobs: Jobs) -> None:
        self.kept: Any = None
        self._jobs = jobs
        self._mine: list[Job[Any]] = []

    @property
    def has_news(self) -> bool:
        """Whether a job of this form runs or waits, or ended while nobody listened."""
        return any(not job.is_told for job in self._mine)

    def start(self, work: Callable[[Progress], T]) -> Job[T]:
        """Begin a job, which goes on if nobody listens."""
        job = self._jobs.start(work)
        self._mine = [*(one for one in self._mine if one.state().phase in ("waiting", "running")), job]
        return job

    def run(self, work: Callable[[Progress], T]) -> Iterator[JobState[T]]:
        """Begin a job; how far it is, until its end."""
        yield from self.start(work).states()

    def follow(self) -> Iterator[JobState[Any]]:
        """How far the jobs of this form are, one after the other, until none is left."""
        followed: list[Job[Any]] = []
        while job := next((one for one in self._mine if one not in followed), None):
            yield from job.states()
            followed.append(job)

    def count(self, phase: Phase) -> int:
        """How many jobs of this form are in a phase."""
        return sum(job.state().phase == phase for job in self._mine)

    def cancel(self) -> None:
        """End all jobs of this form, those that wait too."""
        for job in self._mine:
            job.cancel()


LASTING = Jobs()
"""For a program that makes its page anew while it runs: what began on a page goes on, and the next one shows it."""
