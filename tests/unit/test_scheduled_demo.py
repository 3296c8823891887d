"""Schedules on the embedded model: off is the base's picture, a start and a stop are switches by hand."""

from __future__ import annotations

import pytest

from lib_lora import LoraSession
from lib_lora.hosts.host import GenerateRequest
from lib_lora.hosts.standalone.demo import LORA_DIR
from lib_lora.hosts.standalone.generate import generate
from lib_lora.hosts.standalone.loading import DEMO, load_pipeline

PROMPT = "a red circle on a blue background"
STEPS, CHANGE = 6, 3


@pytest.fixture(scope="module")
def loaded():
    return load_pipeline(DEMO, "cpu", "fp32")


@pytest.fixture(params=["prefuse", "hook"])
def session(request, loaded):
    session = LoraSession.for_pipeline(loaded.pipe, LORA_DIR, mode=request.param)
    yield session
    session.unload()


@pytest.fixture
def draw(session, loaded):
    def run(tags: str) -> bytes:
        return generate(loaded, session, GenerateRequest(f"{PROMPT}{tags}", steps=STEPS, seed=5))[0].image.tobytes()

    return run


def test_a_schedule_that_is_off_draws_the_base_bit_for_bit(draw):
    base = draw("")
    for schedule in (f"start={STEPS}", "stop=0", "step=4-2"):
        assert draw(f" <lora:stripes:1:{schedule}>") == base
    assert draw(" <lora:stripes:1>") != base


@pytest.mark.parametrize(("schedule", "before", "after"), [("start", 0.0, 1.0), ("stop", 1.0, 0.0)])
def test_a_start_and_a_stop_are_switches_by_hand(session, draw, monkeypatch, schedule, before, after):
    scheduled = draw(f" <lora:stripes:0:1:{schedule}={CHANGE}> <lora:outline:0.5>")

    def advance(session, now, _steps):
        if now == CHANGE:
            session.set([("stripes", 0.0, after), ("outline", 0.5)])

    monkeypatch.setattr(LoraSession, "advance", advance)
    assert draw(f" <lora:stripes:0:{before:g}> <lora:outline:0.5>") == scheduled
