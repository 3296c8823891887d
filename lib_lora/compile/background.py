"""One thread that works through what is asked of it, and is gone when nothing is left."""

from __future__ import annotations

import threading
from collections import deque
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING

from lib_lora.compile.chance import chance_left_alone

if TYPE_CHECKING:
    from collections.abc import Callable


class Background:
    """Jobs one after the other, beside the thread that draws. They must not raise.

    It is no daemon, for a compiler that is torn down in the middle takes the process with it; instead it stops after
    the job that runs when the program ends.
    """

    def __init__(self) -> None:
        self._jobs = deque["Callable[[], None]"]()
        self._changed = threading.Condition()
        self._is_running = False

    def add(self, job: Callable[[], None]) -> None:
        """Do it when those before are done, in the context of the caller: torch keeps its configuration there."""
        with self._changed:
            self._jobs.append(partial(copy_context().run, job))
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._work, name="prefuse-compile").start()

    def stop(self) -> int:
        """Forget the jobs that were not begun; how many they were."""
        with self._changed:
            forgotten = len(self._jobs)
            self._jobs.clear()
            return forgotten

    def wait(self, seconds: float | None) -> bool:
        """Until no job is left; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_running, seconds)

    def _work(self) -> None:
        with chance_left_alone():
            while job := self._next():
                job()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            if self._jobs and is_running():
                return self._jobs.popleft()
            self._is_running = False
            self._changed.notify_all()
            return None


def is_running() -> bool:
    """Whether the program goes on; torch can compile little when it ends."""
    return threading.main_thread().is_alive()
