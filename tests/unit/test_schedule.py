"""Strengths in time: what start, stop, step and curves mean in each step, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.prompt.tags import LoraRequest, parse_arguments, parse_prompt

FLOAT_ERROR = 1e-12


def request(arguments: str, **options) -> LoraRequest:
    (found,) = parse_prompt(f"<lora:a:{arguments}>", **options).requests
    return found


def strengths(arguments: str, steps: int) -> list[float]:
    return [request(arguments).strengths(step, steps)[1] for step in range(steps)]


# Arguments, steps, and the UNet's strength in each: of whole steps, of parts of all steps.
WINDOWS = [
    ("0.5:start=2", 5, [0, 0, 0.5, 0.5, 0.5]),
    ("0.5:stop=2", 5, [0.5, 0.5, 0, 0, 0]),
    ("0.5:start=1:stop=3", 5, [0, 0.5, 0.5, 0, 0]),
    ("0.5:step=1-3", 5, [0, 0.5, 0.5, 0, 0]),
    ("0.5:start=4:step=1-3", 5, [0, 0.5, 0.5, 0, 0]),
    ("0.5:start=0:stop=99", 5, [0.5] * 5),
    ("0.5:start=5", 5, [0] * 5),
    ("0.5:stop=0", 5, [0] * 5),
    ("0.5:step=3-1", 5, [0] * 5),
    ("0.5:start= 1 ", 3, [0, 0.5, 0.5]),
    ("0.5:start=0.5", 4, [0, 0, 0.5, 0.5]),
    ("0.5:start=0.5", 5, [0, 0, 0, 0.5, 0.5]),
    ("0.5:stop=0.7", 10, [0.5] * 7 + [0] * 3),
    ("0.5:step=0.2-0.6", 5, [0, 0.5, 0.5, 0, 0]),
    ("0.5:start=0.2:stop=3", 5, [0, 0.5, 0.5, 0, 0]),
    ("0.5:start=0.0", 2, [0.5, 0.5]),
]


@pytest.mark.parametrize(("arguments", "steps", "expected"), WINDOWS)
def test_a_lora_acts_from_the_step_start_and_no_more_from_the_step_stop(arguments, steps, expected):
    assert strengths(arguments, steps) == expected


# Curve, points as numpy takes them, and whether positions are parts of the pass.
CURVES = [
    ("0@0,1@1", ([0, 1], [0, 1]), True),
    ("0@0,1@0.5", ([0, 0.5], [0, 1]), True),
    ("1@0;0.25@0.3;-1@1", ([0, 0.3, 1], [1, 0.25, -1]), True),
    ("1@0.2,0@0.4", ([0.2, 0.4], [1, 0]), True),
    ("0@0,1", ([0, 1], [0, 1]), True),
    ("1@1,0@0", ([0, 1], [0, 1]), True),
    ("0~0,1~1", ([0, 1], [0, 1]), True),
    (" 0 @ 0 , 1 @ 1 ", ([0, 1], [0, 1]), True),
    ("0.7@0.5", ([0.5], [0.7]), True),
    ("1@0,0@10", ([0, 10], [1, 0]), False),
    ("0@2,1@6,0.5@7", ([2, 6, 7], [0, 1, 0.5]), False),
    ("0@0,1@1,0@4", ([0, 1, 4], [0, 1, 0]), False),
    ("0@0,1@4,0@4,1@8", ([0, 4, 4, 8], [0, 1, 0, 1]), False),
]


@pytest.mark.parametrize(("curve", "points", "is_fraction"), CURVES)
@pytest.mark.parametrize("steps", [1, 2, 9, 20])
def test_a_curve_is_straight_between_its_points_and_flat_beyond(curve, points, is_fraction, steps):
    at = np.arange(steps) / max(steps - 1, 1) if is_fraction else np.arange(steps)
    assert strengths(curve, steps) == pytest.approx(np.interp(at, *points).tolist(), abs=FLOAT_ERROR)


@pytest.mark.parametrize(
    ("arguments", "te", "unet"),
    [
        ("0.2@0,1@1", 0.2, [0.2, 0.6, 1]),
        ("0.2@0,1@1:0.5", 0.2, [0.5, 0.5, 0.5]),
        ("0.5:0.2@0,1@1", 0.5, [0.2, 0.6, 1]),
        ("0.5:te=0.3@0,0@1", 0.3, [0.3, 0.15, 0]),
        ("0.5:unet=0.3@0,0@1", 0.5, [0.3, 0.15, 0]),
        ("unet=1@0,0@1:te=0.7", 0.7, [1, 0.5, 0]),
        ("0.5:start=1", 0, [0, 0.5, 0.5]),
        ("0.5:stop=1", 0.5, [0.5, 0, 0]),
        ("0.2@0,1@1:start=2", 0, [0, 0, 1]),
    ],
)
def test_prompts_are_encoded_with_the_strength_of_step_0(arguments, te, unet):
    found = request(arguments)
    assert [found.strengths(step, 3) for step in range(3)] == [(te, pytest.approx(one)) for one in unet]
    assert found.strengths()[0] == te


@pytest.mark.parametrize(
    ("arguments", "first", "hires"),
    [
        ("0.5:hr=0.2", (0.5, 0.5), (0.2, 0.2)),
        ("0.5:0.7:hr=0", (0.5, 0.7), (0, 0)),
        ("0.5:0.7:hrte=0.1", (0.5, 0.7), (0.1, 0.7)),
        ("0.5:0.7:hrunet=0.1", (0.5, 0.7), (0.5, 0.1)),
        ("0.5:hrunet=0.1:hr=0.2", (0.5, 0.5), (0.2, 0.1)),
        ("te=0.3:hrte=0.1:hr=0.2", (0.3, 0.3), (0.1, 0.2)),
        ("0.5", (0.5, 0.5), (0.5, 0.5)),
        ("0.5:hr=0.4@0,1@1", (0.5, 0.5), (0.4, 0.4)),
    ],
)
def test_the_hires_pass_has_the_firsts_strengths_unless_the_tag_says_others(arguments, first, hires):
    assert request(arguments).strengths() == first
    assert request(arguments, hires=True).strengths() == hires


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("1,0@0.5", "te has the point '1'"),
        ("0@0@1", "te has the point '0@0@1'"),
        ("0@0,1@0.5,0@10", "te has positions up to 1, parts of the pass, and beyond, steps"),
        ("0@0,1@2.5", "te has positions up to 1, parts of the pass, and beyond, steps"),
        ("0@-1,1@1", "a position of te is -1"),
        ("0@nan", "a position of te is nan"),
        ("0@x", "a position of te is 'x'"),
        ("x@0,1@1", "te is 'x'"),
        ("0@0,101@1", "te is 101"),
        ("@", "a position of te is ''"),
        ("0@0,", "te is ''"),
        ("1:unet=0@0,nan@1", "unet is nan"),
        ("1:hr=x", "hr is 'x'"),
        ("1:hrte=", "hrte is ''"),
        ("1:hrunet=1,0@1", "hrunet has the point '1'"),
        ("1:start=x", "start is 'x'"),
        ("1:start=-1", "start is -1"),
        ("1:start=1.5", "start is 1.5; write a whole step"),
        ("1:stop=nan", "stop is nan"),
        ("1:stop=1.0001", "stop is 1.0001; write a whole step"),
        ("1:step=5-", "stop is ''"),
        ("1:step=1-2-3", "stop is '2-3'"),
        ("1:step=a-b", "start is 'a'"),
    ],
)
def test_what_is_no_time_is_refused_with_a_sentence(arguments, said):
    parsed = parse_prompt(f"<lora:good:1><lora:a:{arguments}>")
    assert [one.name for one in parsed.requests] == ["good"]
    assert said in parsed.problems[0].message


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("1:start=3", "start=3"),
        ("1:step=2-0.5", "start=2:stop=0.5"),
        ("0@0,1@1", "te=0@0,1@1:unet=0@0,1@1"),
        ("1:unet=0@0,1@1:stop=20", "unet=0@0,1@1:stop=20"),
    ],
)
def test_a_schedule_is_told_as_arguments_that_ask_for_the_same(arguments, text):
    schedule = request(arguments).schedule
    assert str(schedule) == text
    assert request(text).schedule == schedule


def test_a_tag_without_times_has_no_schedule():
    assert request("0.5:0.7:lbw=MIDD").schedule is None


def test_a_step_alone_is_ignored_and_told():
    assert (request("0.5:step=5").schedule, request("0.5:step=5").ignored) == (None, ("step=5",))
    assert str(request("0.5:start=2:step=5").schedule) == "start=2"
    (found,) = parse_arguments([(["a", 0.5], {"step": 5, "stop": 3})]).requests
    assert (str(found.schedule), found.ignored) == ("stop=3", ("step=5",))


POINTS = st.lists(st.tuples(st.floats(-100, 100), st.floats(0, 1) | st.integers(0, 50)), min_size=1, max_size=6)


@settings(max_examples=1000, deadline=None)
@given(POINTS, st.integers(1, 60), st.sampled_from(["", ":start=3", ":stop=0.4", ":step=0.1-9"]))
def test_any_curve_is_within_its_points_or_refused(points, steps, window):
    curve = ",".join(f"{weight}@{position}" for weight, position in points)
    parsed = parse_prompt(f"<lora:a:1:unet={curve}{window}>")
    for one in parsed.requests:
        found = [one.strengths(step, steps)[1] for step in range(steps)]
        low, high = (limit((0.0, *(weight for weight, _ in points))) for limit in (min, max))
        assert all(low - FLOAT_ERROR * 100 <= value <= high + FLOAT_ERROR * 100 for value in found)
    assert len(parsed.requests) + len(parsed.problems) == 1
