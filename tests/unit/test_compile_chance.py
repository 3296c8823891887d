"""What is compiled in the background does not touch the random numbers of pictures."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from lib_lora.compile.background import Background

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 60
X = torch.linspace(-1, 1, 8)


def torchs() -> float:
    return torch.rand(()).item()


def numbers_around_a_compilation(draw: Callable[[], float]) -> list[float]:
    """Drawn before a graph is lowered in another thread, meanwhile, and when it is done."""
    torch._dynamo.reset()  # or the graph of an earlier one is taken
    begun, drawn = threading.Event(), threading.Event()
    background = Background()

    def lower(graph, inputs):
        begun.set()
        assert drawn.wait(SECONDS)
        return graph

    def job():
        torch.compile(lambda x: (x + 1).sin(), backend=lower)(X)

    first = draw()
    background.add(job)
    assert begun.wait(SECONDS)
    second = draw()
    drawn.set()
    assert background.wait(SECONDS)
    return [first, second, draw()]


@pytest.mark.parametrize(("seed", "draw"), [(torch.manual_seed, torchs), (random.seed, random.random)])
def test_numbers_drawn_while_something_is_compiled_do_not_come_again(seed, draw):
    seed(7)
    found = numbers_around_a_compilation(draw)
    seed(7)
    assert found == [draw() for _ in range(3)]


def test_other_threads_can_put_the_state_back_meanwhile():
    begun, done = threading.Event(), threading.Event()
    background = Background()

    def job():
        begun.set()
        assert done.wait(SECONDS)

    state = torch.random.get_rng_state()
    expected = torch.rand(3)
    background.add(job)
    assert begun.wait(SECONDS)
    torch.random.set_rng_state(state)
    again = torch.rand(3)
    done.set()
    assert background.wait(SECONDS)
    assert torch.equal(again, expected)


def test_torchs_own_functions_are_back_when_nothing_is_left_to_compile():
    own = torch.random.set_rng_state, torch.cuda.set_rng_state, random.setstate
    background = Background()
    background.add(lambda: None)
    for thread in threading.enumerate():
        if thread.name == "prefuse-compile":
            thread.join(SECONDS)
    assert (torch.random.set_rng_state, torch.cuda.set_rng_state, random.setstate) == own
