"""Every weight and encoded prompt, hashed when a pass begins: hires, cached conds, checkpoints that come and go."""

from __future__ import annotations

import copy
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.core.keymap import KeyMap
from lib_lora.session import LoraSession
from tests.toys import digest, lierla, write_lora

TAGS = {"": [], "<lora:ink:0.8>": [("ink", 0.8)], "<lora:wash:0.5>": [("wash", 0.5)]}
TEXT = "a cat "
SWITCHES, WARM, GROWTH = 50, 10, 0.03
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Pass:
    """What a pass of a generation meets: hashes of all weights and of the conds."""

    weights: str
    conds: bytes


@pytest.fixture
def passes(webui, monkeypatch) -> list[Pass]:
    """Those of all generations, in order; nothing is drawn."""
    seen = []

    def meet(p, c, uc):
        seen.append(Pass(webui.state(), c[:1].numpy().tobytes()))
        return torch.zeros(1)

    monkeypatch.setattr(webui.modules.processing, "denoise", meet)
    return seen


@pytest.fixture
def alone(templates, lora_dir):
    """The same of a session on a fresh model, without any WebUI."""
    known = {}

    def make(request, checkpoint="first", **options) -> Pass:
        key = (tuple(request), checkpoint, *options.items())
        if key not in known:
            model = copy.deepcopy(templates[checkpoint])
            LoraSession(model.parts(), LoraCatalog([lora_dir]), **options).set(request)
            with torch.no_grad():
                conds = model.get_learned_conditioning([TEXT])
            known[key] = Pass(digest(*model.parts().values()), conds.numpy().tobytes())
        return known[key]

    return make


SECOND = {**{f"{TEXT}{tag}": request for tag, request in TAGS.items()}, "": None}
"""Prompts of the hires pass; without one it is the first pass's."""


@pytest.mark.parametrize("lowvram", [False, True])
def test_twelve_pairs_of_passes_have_the_weights_and_conds_of_their_own_tags(
    webui, passes, alone, monkeypatch, lowvram
):
    monkeypatch.setattr(type(webui.model), "lowvram", lowvram)
    pairs = list(itertools.product(TAGS, SECOND))
    assert len(pairs) == 12
    for tag, hr_prompt in pairs:
        passes.clear()
        done = webui.generate(f"{TEXT}{tag}", enable_hr=True, hr_prompt=hr_prompt)
        first = TAGS[tag]
        second = first if SECOND[hr_prompt] is None else SECOND[hr_prompt]
        assert passes == [alone(first), alone(second)], (tag, hr_prompt)
        hashed = done.extra_generation_params.get("Lora hashes", "")
        assert {name for name in ("ink", "wash") if name in hashed} == {name for name, _ in (*first, *second)}
    assert not webui.modules.errors.shown


INK, WASH, BOTH = TAGS["<lora:ink:0.8>"], TAGS["<lora:wash:0.5>"], [("wash", 0.5), ("ink", 0.8)]
INK_TAG, WASH_TAG = f"{TEXT}<lora:ink:0.8>", f"{TEXT}<lora:wash:0.5>"
BOTH_TAGS = f"{TEXT}<lora:wash:0.5><lora:ink:0.8>"
COMPAT = {"override_settings": {"prefuse_compat": "a1111"}}
OTHER = {"override_settings": {"sd_model_checkpoint": "second"}}
HIRES = {"enable_hr": True, "hr_prompt": TEXT}
REFINER = {"refiner_checkpoint": "second"}
SEQUENCES = {
    "tags come, change and go": [
        (INK_TAG, {}, [(INK, {})]),
        (WASH_TAG, {}, [(WASH, {})]),
        (TEXT, {}, [([], {})]),
        (INK_TAG, {}, [(INK, {})]),
    ],
    "the arithmetic changes": [
        (BOTH_TAGS, {}, [(BOTH, {})]),
        (BOTH_TAGS, COMPAT, [(BOTH, {"compat": "a1111"})]),
        (BOTH_TAGS, {}, [(BOTH, {})]),
    ],
    "the checkpoint changes": [
        (INK_TAG, {}, [(INK, {})]),
        (INK_TAG, OTHER, [(INK, {"checkpoint": "second"})]),
        (INK_TAG, {}, [(INK, {})]),
        (TEXT, OTHER, [([], {"checkpoint": "second"})]),
    ],
    "the second pass has none": [
        (INK_TAG, HIRES, [(INK, {}), ([], {})]),
        (INK_TAG, HIRES, [(INK, {}), ([], {})]),
        (INK_TAG, {}, [(INK, {})]),
        (TEXT, HIRES, [([], {}), ([], {})]),
    ],
    "a refiner encodes in the middle": [
        (INK_TAG, REFINER, [(INK, {}), (INK, {"checkpoint": "second"})]),
        (INK_TAG, {}, [(INK, {})]),
        (INK_TAG, REFINER, [(INK, {}), (INK, {"checkpoint": "second"})]),
        (TEXT, {}, [([], {})]),
    ],
}


@pytest.mark.parametrize("steps", SEQUENCES.values(), ids=SEQUENCES)
def test_no_pass_is_given_conds_that_were_encoded_with_other_loras(webui, passes, alone, steps):
    webui.set(sd_model_checkpoint="first")
    for number, (prompt, options, expected) in enumerate(steps):
        passes.clear()
        webui.generate(prompt, **options)
        assert passes == [alone(request, **more) for request, more in expected], number


def test_conds_of_a_file_that_was_replaced_are_encoded_anew(webui, passes, alone, lora_dir):
    """The sixth sequence: the same text, other content, and the first content again."""
    layers = lierla(KeyMap.from_modules(webui.model.parts()))
    path = lora_dir / "changing.safetensors"
    try:
        for seed in (1, 2, 1):
            write_lora(path, layers, seed=seed)
            passes.clear()
            webui.generate(f"{TEXT}<lora:changing:0.8>")
            # ink is the file of seed 1
            assert (passes == [alone(INK)]) == (seed == 1)
    finally:
        path.unlink()


@pytest.mark.parametrize(("in_place", "cache"), [(True, 0), (True, 1), (True, 2), (False, 0)])
def test_twenty_switches_of_the_checkpoint_end_in_the_weights_of_a_fresh_load(webui, passes, alone, in_place, cache):
    webui.modules.sd_models.in_place = in_place
    webui.set(sd_checkpoint_cache=cache)
    for turn in range(20):
        checkpoint, tag = ("first", "second")[turn % 2], list(TAGS)[turn // 2 % 3]
        passes.clear()
        webui.generate(f"{TEXT}{tag}", override_settings={"sd_model_checkpoint": checkpoint})
        assert passes == [alone(TAGS[tag], checkpoint)], turn
    webui.generate(TEXT)
    for model in webui.modules.sd_models.model_data.loaded_sd_models:
        assert digest(*model.parts().values()) == alone([], model.sd_checkpoint_info.name).weights


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which only Linux has")
def test_fifty_switches_with_loras_take_no_more_memory_than_ten(webui, passes):
    webui.modules.sd_models.in_place = False
    sizes = []
    for turn in range(SWITCHES):
        checkpoint = ("first", "second")[turn % 2]
        webui.generate(INK_TAG, override_settings={"sd_model_checkpoint": checkpoint})
        sizes.append(anonymous_bytes())
    assert sizes[-1] <= sizes[WARM] * (1 + GROWTH) + MEGABYTE
