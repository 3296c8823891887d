"""Block weights and schedules: pictures that must be equal, and what the infotext holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.webui_real.server import largest_difference
from tests.webui_real.test_passes import HIRES
from tests.webui_real.test_pictures import CLEAR, TEXT

if TYPE_CHECKING:
    from tests.webui_real.server import WebUI

STEPS = 3
ON = f"{TEXT} <lora:a:0.8>"


def tagged(arguments: str) -> str:
    return f"{TEXT} <lora:a:0.8:{arguments}>"


def test_block_weights_are_factors_of_the_strength(webui: WebUI) -> None:
    half, plain = webui.draw(f"{TEXT} <lora:a:0.4>").picture, webui.draw(TEXT).picture
    assert np.array_equal(webui.draw(tagged("lbw=ALL0.5")).picture, half)
    assert np.array_equal(webui.draw(f"{TEXT} <lora:a:0.4:0.8:in=0.5:mid=0.5:out=0.5>").picture, half)
    assert np.array_equal(webui.draw(tagged("lbw=NONE")).picture, plain)
    assert largest_difference(webui.draw(tagged("lbw=OUTALL")).picture, half) > CLEAR


def test_drawn_weights_come_back_with_the_seed_and_with_the_infotext(webui: WebUI) -> None:
    prompt = tagged(f"lbw={'R,' * 16}U")
    first, again, other = (webui.draw(prompt, seed=seed) for seed in (4, 4, 5))
    assert np.array_equal(first.picture, again.picture)
    tags = [
        re.search("<lora:a:0.8:lbw=[^>]*>", answer.infotext.split("Lora resolved", 1)[1]) for answer in (first, other)
    ]
    assert tags[0][0] != tags[1][0]
    assert np.array_equal(webui.draw(f"{TEXT} {tags[0][0]}", seed=4).picture, first.picture)


@pytest.mark.parametrize("sampler", ["Euler a", "Heun", "DDIM"])
def test_steps_are_counted_from_0_to_the_last(webui: WebUI, sampler: str) -> None:
    options = {"steps": STEPS, "sampler_name": sampler}
    on, plain = webui.draw(ON, **options).picture, webui.draw(TEXT, **options).picture
    for never in (f"start={STEPS}", "stop=0", "start=0.99"):
        assert np.array_equal(webui.draw(tagged(never), **options).picture, plain)
    for always in (f"stop={STEPS}", "start=0", "unet=0.8@0,0.8@1"):
        assert np.array_equal(webui.draw(tagged(always), **options).picture, on)
    pictures = [
        webui.draw(tagged(one), **options).picture for one in (f"start={STEPS - 1}", f"stop={STEPS - 1}", "stop=1")
    ]
    pictures += [on, plain]
    assert len({picture.tobytes() for picture in pictures}) == 5


def test_img2img_and_batches_begin_at_step_0(webui: WebUI) -> None:
    first = webui.draw(TEXT, seed=7).picture
    plain = webui.redraw(TEXT, first).picture
    assert np.array_equal(webui.redraw(tagged("start=99"), first).picture, plain)
    alone = webui.draw(tagged("stop=1"), seed=2).picture
    assert np.array_equal(webui.draw(tagged("stop=1"), seed=1, n_iter=2).pictures[-1], alone)


def test_the_hires_pass_has_its_own_strengths(webui: WebUI) -> None:
    for own, same in (("hr=0.3", "<lora:a:0.3>"), ("hr=0", ""), ("hrunet=0.3", "<lora:a:0.8:0.3>")):
        expected = webui.draw(ON, **HIRES, hr_prompt=f"{TEXT} {same}").picture
        assert np.array_equal(webui.draw(tagged(own), **HIRES).picture, expected)
