"""Block weights and curves beside what LoRA Block Weight, loractl and kohya's scripts make of the same texts.

Their rules are written down here anew, or their results were recorded; none of it calls our own.
"""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.errors import TagError
from lib_lora.prompt.block_weights import BlockRequest, Presets
from lib_lora.prompt.preset_texts import WEIGHTS
from lib_lora.prompt.tags import LoraRequest, parse_prompt
from tests.fullsize import facts

INDEX = facts("block_index")
NAMES = ["M00" if name == "MID" else name for name in INDEX["lbw_names"]]
FORMULA_ERROR = 1e-12


def request(arguments: str, **options) -> LoraRequest:
    (found,) = parse_prompt(f"<lora:{':'.join(filter(None, ['a', arguments]))}>", **options).requests
    return found


# kohya's learning rates of blocks: `train_network.py --network_args down_lr_weight=…` was run

RECORDED = [
    (case["kwargs"][part], part, case["result"], case["sdxl"])
    for case in facts("block_lr_weight")
    for part in ("down_lr_weight", "up_lr_weight")
    if part in case["kwargs"] and len(case["kwargs"]) == 1 and isinstance(case["result"], list)
    if case["kwargs"][part][0].isalpha()
]


@pytest.mark.parametrize(("curve", "part", "theirs", "is_sdxl"), RECORDED)
def test_a_curve_over_some_blocks_has_the_numbers_that_kohyas_scripts_give_them(curve, part, theirs, is_sdxl):
    count = 9 if is_sdxl else 12
    first = (1 if is_sdxl else 0) if part == "down_lr_weight" else 13
    kind = "IN" if part == "down_lr_weight" else "OUT"
    blocks = [f"{kind}{number:02d}" for number in range(count)]
    found = BlockRequest(curve).resolve(Presets(), blocks)
    assert [found.of(block, "") for block in blocks] == pytest.approx(theirs[first : first + count], abs=FORMULA_ERROR)


def test_there_are_recorded_curves():
    assert len(RECORDED) == 40


# LoRA Block Weight

LISTS = {12, 17, 20, 26, 61}


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 16, 17, 18, 19, 20, 21, 25, 26, 27, 60, 61, 62])
def test_a_line_of_a_file_is_a_preset_if_it_has_as_many_commas_as_a_list(count):
    line = f"MY:{','.join(['0.5'] * count)}"
    assert bool(WEIGHTS.presets(line)) == (count in LISTS)
    parsed = parse_prompt(f"<lora:a:1:lbw={line[3:]}>")
    assert bool(parsed.requests) == (count in LISTS or count == 1)  # one alone is the name of a preset


@pytest.mark.parametrize("name", ["midd", "Midd", "all", "SINE", "Linear", "r", "x"])
def test_names_are_case_sensitive(name):
    parsed = parse_prompt(f"<lora:a:1:lbw={name}>").requests[0]
    with pytest.raises(TagError, match="names no preset"):
        parsed.blocks.resolve(Presets(), NAMES)


# Arguments behind the strength; for X: what stands in the list, and the number that it comes to.
X_TABLE = [
    ("lbw={}", "X", 1.0),
    ("lbw={}", "X+0.25", 1.25),
    ("lbw={}", "X-0.25", 0.75),
    ("lbw={}:x=0.5", "X", 0.5),
    ("x=0.5:lbw={}", "X+1", 1.5),
    ("0.7:8:lbw={}", "X", 8.0),
    ("0.7:8:lbw={}:x=0.5", "X-1", -0.5),
    ("0.7:lbw={}", "X", 1.0),
    ("w={}:x=2", "X", 2.0),
]


@pytest.mark.parametrize(("arguments", "item", "number"), X_TABLE)
def test_x_is_its_argument_or_the_fourth_position_or_1(arguments, item, number):
    numbers = ",".join([item] + ["0"] * 25)
    found = request(f"1:{arguments.format(numbers)}").blocks.resolve(Presets(), NAMES)
    assert found.of("BASE", "") == number


LAYERS = [
    ("IN04", "input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
    ("IN05", "input_blocks_5_1_transformer_blocks_0_attn2_to_out_0"),
    ("M00", "middle_block_1_transformer_blocks_0_ff_net_0_proj"),
    ("OUT05", "output_blocks_5_2_conv"),
    ("OUT11", "output_blocks_11_1_proj_in"),
    ("BASE", "transformer_text_model_encoder_layers_0_self_attn_q_proj"),
]


def their_ratio(rules: str, block: str, layer: str) -> float:
    """What the extension's loop over the rules comes to, for a block of weight 1."""
    ratio = 1.0
    for rule in rules.split(","):
        blocks, elements, number = (field.split(" ") for field in rule.split(";"))
        spread = []
        for word in blocks:
            first, _, last = word.partition("-")
            spread += NAMES[NAMES.index(first) : NAMES.index(last) + 1] if last else [word]
        key, fits = layer + block, []
        for words in (spread, elements):
            is_not = words[0] == "NOT"
            is_in = any(word in key for word in words[is_not:])
            fits.append(is_in != is_not)
        ratio = float(number[0]) if all(fits) else ratio
    return ratio


NOT = st.sampled_from(["", "NOT "])
BLOCKS = st.sampled_from(["IN04", "IN05 M00", "IN03-IN05", "OUT00-OUT11", "BASE", "BASE IN04-OUT05", "OUT", "IN"])
ELEMENTS = st.sampled_from(["attn", "attn1 attn2", "to_q", "proj", "proj_in", "ff_net", "transformer", "conv", "xyz"])
EVERY = st.just("")
RATIOS = st.sampled_from(["0", "0.5", "1", "-1", "2"])
FIELD = [EVERY | st.tuples(NOT, words).map("".join) for words in (BLOCKS, ELEMENTS)]
RULES = st.lists(st.tuples(*FIELD, RATIOS).map(";".join), min_size=1, max_size=4).map(",".join)


@settings(max_examples=600, deadline=None)
@given(RULES)
def test_rules_give_every_layer_the_weight_that_the_extensions_loop_gives(rules):
    found = BlockRequest(elements=rules).resolve(Presets(), NAMES)
    assert [found.of(*layer) for layer in LAYERS] == [their_ratio(rules, *layer) for layer in LAYERS]


# loractl

SLOTS = {"te position": "0.11", "unet position": "0.22", "te": "0.33", "unet": "0.44"}
SLOTS |= {"hr": "0.55", "hrte": "0.66", "hrunet": "0.77"}


def their_strengths(there: set[str]) -> dict[str, float]:
    """te <- position <- te=; unet <- te, position, unet=; each of the hires pass <- that, hr=, its own."""

    def last(*slots: str, default: float) -> float:
        return next((float(SLOTS[slot]) for slot in reversed(slots) if slot in there), default)

    te = last("te position", "te", default=1.0)
    unet = last("unet position", "unet", default=te)
    return {
        "te": te,
        "unet": unet,
        "hrte": last("hr", "hrte", default=te),
        "hrunet": last("hr", "hrunet", default=unet),
    }


@pytest.mark.parametrize("positions", [(), ("te position",), ("te position", "unet position")])
def test_strengths_come_from_the_arguments_in_loractls_order(positions):
    names = ["te", "unet", "hr", "hrte", "hrunet"]
    rng = random.Random(0)
    for flags in product([False, True], repeat=len(names)):
        there = {*positions, *(name for name, flag in zip(names, flags, strict=True) if flag)}
        named = [f"{name}={SLOTS[name]}" for name in there - set(positions)]
        rng.shuffle(named)
        arguments = ":".join([*(SLOTS[one] for one in positions), *named])
        first, hires = (request(arguments, hires=is_hires).strengths() for is_hires in (False, True))
        theirs = their_strengths(there)
        assert (*first, *hires) == (theirs["te"], theirs["unet"], theirs["hrte"], theirs["hrunet"]), arguments


POSITIONS = st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True) | st.lists(
    st.integers(0, 20).map(lambda part: part / 20), min_size=1, max_size=6, unique=True
)


@settings(max_examples=600, deadline=None)
@given(POSITIONS, st.integers(1, 50), st.sampled_from(",;"), st.sampled_from("@~"), st.randoms(use_true_random=False))
def test_a_curve_is_what_numpy_makes_of_its_points_in_any_order_and_spelling(positions, steps, item, at, rng):
    points = [(position, rng.randint(-20, 20) / 10) for position in positions]
    curve = item.join(f"{weight}{at}{position}" for position, weight in points)
    is_fraction = max(positions) <= 1
    found = request(f"1:{curve}")
    where = np.arange(steps) / max(steps - 1, 1) if is_fraction else np.arange(steps)
    theirs = np.interp(where, *zip(*sorted(points), strict=True))
    ours = [found.strengths(step, steps)[1] for step in range(steps)]
    assert ours == pytest.approx(theirs.tolist(), abs=FORMULA_ERROR)
