"""The tag parser on any text."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.prompt.tags import parse_prompt
from lib_lora.prompt.values import MAX_STRENGTH

EXAMPLES, MANY = 2500, 10_000

PIECES = ["<lora:", "<lyco:", "<hypernet:", "<LORA:", "<", ">", ">", ":", ":", "=", "a", " b ", "é\n", "\0", "\ud800"]
PIECES += ["te=", "unet=", "dyn=", "lbw=MIDD", "0.5", "-3", "16", "１.５", "1_0", "nan", "-1e999", "1e30", "9" * 5000]
PIECES += ["lbw=", "lbwe=", "in=", "x=", "1,0," * 8, "R,", "X-0.5,", "X", "IN05-OUT05;attn", ";;", "NOT ", ",1"]
PIECES += ["start=", "stop=0.5", "step=1-3", "hr=", "hrte=", "0@0", ",1@1", ";0.5@9", "~2", "@", "-"]
PROMPTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=20))

NAMES = st.text(st.characters(exclude_characters=":>="), min_size=1, max_size=20)
STRENGTHS = st.floats(-MAX_STRENGTH, MAX_STRENGTH)


@settings(max_examples=EXAMPLES, deadline=None)
@given(PROMPTS)
def test_no_text_raises_and_every_request_is_within_the_limits(prompt: str) -> None:
    check_limits(prompt)


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None)
@given(PROMPTS)
def test_none_of_many_texts_raises_and_every_request_is_within_the_limits(prompt: str) -> None:
    check_limits(prompt)


def check_limits(prompt: str) -> None:
    parsed = parse_prompt(prompt)
    for request in parsed.requests:
        assert request.name
        strengths = (request.te, request.unet, *request.strengths(), *request.strengths(2, 5))
        assert all(math.isfinite(value) and abs(value) <= MAX_STRENGTH for value in strengths)
        assert request.dyn is None or request.dyn >= 0
        assert request.raw in prompt
    for problem in parsed.problems:
        assert problem.raw in prompt
        assert problem.message.isprintable()


@settings(max_examples=500, deadline=None)
@given(PROMPTS)
def test_every_letter_is_either_text_or_part_of_a_tag(prompt: str) -> None:
    parsed = parse_prompt(prompt)
    taken = sum(len(tag.raw) for tag in (*parsed.requests, *parsed.problems))
    assert len(parsed.text) + taken == len(prompt)


@settings(max_examples=500, deadline=None)
@given(PROMPTS, NAMES, STRENGTHS, STRENGTHS)
def test_a_good_tag_applies_whatever_stands_before_it(before: str, name: str, te: float, unet: float) -> None:
    tag = f"<lora:{name}:{te}:{unet}>"
    last = parse_prompt(f"{before}>{tag}").requests[-1]
    assert (last.name, last.te, last.unet, last.raw) == (name, te, unet, tag)
