"""Jobs of the page: one runs, the others wait; each can be cancelled, and says how it ended."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from lib_lora.errors import RequestError
from lib_lora.ui.jobs import Jobs, Slot
from lib_lora.ui.latest import LastAnswer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lib_lora.core.saving import Progress
    from lib_lora.ui.jobs import JobState

STEPS = 2000
STEP_SECONDS = 0.01
PATIENCE_SECONDS = 10.0


class Work:
    """Takes 20 seconds if nobody ends it.

    Attributes:
        begun: Set when it works.
    """

    def __init__(self) -> None:
        self.begun = threading.Event()

    def __call__(self, progress: Progress) -> str:
        for step in range(STEPS):
            progress(step, STEPS)
            self.begun.set()
            time.sleep(STEP_SECONDS)
        return "worked"


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close(PATIENCE_SECONDS)


def last(states: Iterator[JobState[str]]) -> JobState[str]:
    return [*states][-1]


def ended(job) -> JobState[str]:
    end = time.monotonic() + PATIENCE_SECONDS
    while job.state().phase in ("waiting", "running"):
        assert time.monotonic() < end, "the job goes on"
        time.sleep(0.01)
    return job.state()


def test_a_job_gives_its_result(jobs):
    state = last(Slot(jobs).run(lambda progress: "worked"))
    assert (state.phase, state.result) == ("done", "worked")
    assert state.seconds < PATIENCE_SECONDS


def test_a_job_says_how_far_it_is_and_how_long_it_will_take(jobs):
    work = Work()
    job = jobs.start(work)
    assert work.begun.wait(PATIENCE_SECONDS)
    time.sleep(5 * STEP_SECONDS)
    state = job.state()
    assert state.phase == "running"
    assert 0 < state.done < state.total == STEPS
    assert state.since < state.seconds / 2
    assert state.seconds_left == pytest.approx((state.seconds - state.since) * (STEPS - state.done) / state.done)


def test_what_a_job_did_before_it_began_to_count_anew_is_not_foretold_again(jobs):
    go = threading.Event()

    def work(progress: Progress) -> None:
        progress(0, STEPS)
        time.sleep(20 * STEP_SECONDS)
        progress(0, 2 * STEPS)
        progress(STEPS, 2 * STEPS)
        go.wait(PATIENCE_SECONDS)

    job = jobs.start(work)
    end = time.monotonic() + PATIENCE_SECONDS
    while job.state().done < STEPS and time.monotonic() < end:
        time.sleep(STEP_SECONDS)
    state = job.state()
    go.set()
    assert state.seconds_left is not None
    assert state.seconds_left < 10 * STEP_SECONDS < state.seconds


def test_of_a_job_that_has_not_said_how_far_it_is_no_end_is_foretold(jobs):
    go = threading.Event()
    job = jobs.start(lambda progress: go.wait(PATIENCE_SECONDS))
    assert job.state().seconds_left is None
    go.set()


def test_a_fault_of_ours_is_its_sentence_and_another_one_names_its_class(jobs, caplog):
    def refuse(progress: Progress) -> str:
        raise RequestError("The seed must be a number.")

    state = last(Slot(jobs).run(refuse))
    assert (state.phase, state.reason) == ("refused", "The seed must be a number.")
    state = last(Slot(jobs).run(lambda progress: str(1 / 0)))
    assert (state.phase, state.reason) == ("refused", "ZeroDivisionError: division by zero (see the console)")
    assert "Traceback" in caplog.text


def test_a_second_job_waits_for_the_first_and_knows_it(jobs):
    first, second = Work(), Work()
    running = jobs.start(first)
    assert first.begun.wait(PATIENCE_SECONDS)
    waiting = jobs.start(second)
    assert (waiting.state().phase, waiting.state().ahead) == ("waiting", 1)
    assert not second.begun.is_set()
    running.cancel()
    assert second.begun.wait(PATIENCE_SECONDS)
    assert waiting.state().phase == "running"


def test_a_cancelled_job_ends_at_its_next_word_and_the_next_one_begins(jobs):
    work = Work()
    job = jobs.start(work)
    assert work.begun.wait(PATIENCE_SECONDS)
    job.cancel()
    assert ended(job).phase == "cancelled"
    assert last(Slot(jobs).run(lambda progress: "next")).result == "next"


def test_a_job_that_waits_can_be_cancelled_and_never_works(jobs):
    first, second = Work(), Work()
    running = jobs.start(first)
    assert first.begun.wait(PATIENCE_SECONDS)
    waiting = jobs.start(second)
    waiting.cancel()
    assert ended(waiting).phase == "cancelled"
    assert not second.begun.is_set()
    assert running.state().phase == "running"


def test_a_form_cancels_its_own_jobs_those_that_wait_too(jobs):
    mine, other = Slot(jobs), Work()
    running = mine.run(Work())
    assert next(running).phase in ("waiting", "running")
    waiting = mine.run(Work())
    assert next(waiting).phase == "waiting"
    foreign = jobs.start(other)
    mine.cancel()
    assert last(running).phase == last(waiting).phase == "cancelled"
    assert other.begun.wait(PATIENCE_SECONDS)
    assert foreign.state().phase == "running"


def test_a_job_goes_on_when_nobody_listens_any_more(jobs):
    done = threading.Event()
    states = Slot(jobs).run(lambda progress: done.set())
    next(states)
    states.close()
    assert done.wait(PATIENCE_SECONDS)


def test_at_the_end_all_jobs_are_cancelled_and_waited_for(jobs):
    work = Work()
    running, waiting = jobs.start(work), jobs.start(Work())
    assert work.begun.wait(PATIENCE_SECONDS)
    jobs.close(PATIENCE_SECONDS)
    assert running.state().phase == waiting.state().phase == "cancelled"


def test_a_page_that_is_made_anew_finds_the_jobs_of_each_form_until_their_end_was_told(jobs):
    work = Work()
    running = jobs.slot("form").start(work)
    assert not jobs.slot("other").has_news
    assert work.begun.wait(PATIENCE_SECONDS)
    assert jobs.slot("form").has_news
    running.cancel()
    ended(running)
    assert jobs.slot("form").has_news, "nobody has heard of it"
    assert last(jobs.slot("form").follow()).phase == "cancelled"
    assert not jobs.slot("form").has_news


def test_of_questions_that_overlap_the_last_is_answered():
    answer = LastAnswer()
    newer = []

    def older() -> str:
        newer.append(answer.of(lambda: "newer"))
        return "older"

    assert answer.of(older) is None
    assert newer == ["newer"]
    assert answer.of(lambda: "alone") == "alone"
