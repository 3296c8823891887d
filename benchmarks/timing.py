"""Timing by paired repeats: what is compared takes turns, so that a slow minute of the machine hits both."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Sample(NamedTuple):
    """One measurement.

    Attributes:
        wall: Seconds on the clock, with everything that was put on a GPU finished.
        busy: CPU seconds of all threads of the process; on a GPU, seconds between two CUDA events.
    """

    wall: float
    busy: float


def _nothing() -> None:
    pass


@dataclass
class Case:
    """One thing that is timed.

    Attributes:
        name: What the tables call it.
        action: What is timed.
        before: What is done before each time, not timed.
        samples: One a round.
    """

    name: str
    action: Callable[[], object]
    before: Callable[[], object] = _nothing
    samples: list[Sample] = field(default_factory=list[Sample])

    @property
    def wall(self) -> float:
        """Median seconds."""
        return statistics.median(sample.wall for sample in self.samples)

    @property
    def busy(self) -> float:
        """Median CPU seconds, or GPU seconds."""
        return statistics.median(sample.busy for sample in self.samples)


class Ratio(NamedTuple):
    """Median of the ratios of one round each, with its quartiles and the number of rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def range(self) -> str:
        """The quartiles."""
        return f"({self.low:.3g} to {self.high:.3g})"

    def __str__(self) -> str:
        return f"{self.median:.3g} {self.range}"


class Stopwatch:
    """Times an action on one device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def time(self, action: Callable[[], object]) -> Sample:
        """Run `action` once; a GPU has nothing left to do before and after."""
        return self._time_on_gpu(action) if self._cuda else self._time_on_cpu(action)

    @staticmethod
    def _time_on_cpu(action: Callable[[], object]) -> Sample:
        cpu, wall = time.process_time(), time.perf_counter()
        action()
        return Sample(time.perf_counter() - wall, time.process_time() - cpu)

    @staticmethod
    def _time_on_gpu(action: Callable[[], object]) -> Sample:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall = time.perf_counter()
        first.record()
        action()
        last.record()
        torch.cuda.synchronize()
        return Sample(time.perf_counter() - wall, first.elapsed_time(last) / 1e3)


def take_turns(cases: Sequence[Case], rounds: int, stopwatch: Stopwatch, warmup: int = 1) -> None:
    """Time every case once a round, in alternating order; the first `warmup` rounds are not kept."""
    for number in range(-warmup, rounds):
        gc.collect()
        gc.disable()
        try:
            for case in cases if number % 2 else reversed(cases):
                case.before()
                sample = stopwatch.time(case.action)
                if number >= 0:
                    case.samples.append(sample)
        finally:
            gc.enable()


def ratio(case: Case, reference: Case) -> Ratio:
    """How many times as long as the reference the case takes, by the clock, round by round."""
    pairs = zip(case.samples, reference.samples, strict=True)
    return spread([a.wall / b.wall for a, b in pairs])


def extra(case: Case, reference: Case) -> float:
    """Seconds the case takes longer than the reference: the median of the rounds."""
    pairs = zip(case.samples, reference.samples, strict=True)
    return statistics.median(a.wall - b.wall for a, b in pairs)


def spread(values: Sequence[float]) -> Ratio:
    """Median and quartiles; with fewer than 4 values, the smallest and the largest."""
    if len(values) < 4:
        return Ratio(statistics.median(values), min(values), max(values), len(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high, len(values))
