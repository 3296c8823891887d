"""Pictures of a real WebUI: with a tag, without it, and beside the built-in code."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.webui_real.make_models import ALIAS, GOOD
from tests.webui_real.server import largest_difference

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.webui_real.server import Answer, WebUI

TEXT = "a red cube on a table"
ROUNDING = 1
"""Of a picture's 255 levels: other orders of the same fp32 sums end on the other side of a rounding now and then."""
CLEAR = 8
"""Of 255: what a LoRA changes at least somewhere."""
SAME_AS_BUILTIN = (
    "<lora:a:0.8>",
    "<lora:b:0.8>",
    "<lora:c:-0.5>",
    "<lora:loha:0.1>",
    "<lora:a>",
    "<lora:a:0.5:0.2>",
    "<lora:a:te=0.3>",
    "<lora:a:unet=0.3>",
    "<lora:a:0.5:unet=0.3>",
    "<lora:unet=0.3:a:0.5>",
    "<lora:b:0.8:0.8:2>",
    "<lora:b:1:dyn=1>",
    f"<lora:{ALIAS}:0.5>",
    "<lyco:a:0.8>",
    "<lora:a:0.8><lora:b:0.3>",
    "<lora:b:0.3><lora:a:0.8>",
    "<lora:a:0.4> <lora:b:0.3> <lora:c:0.2> <lora:d:0.2> <lora:e:0.2>",
    "<lora:a:0>",
)


@pytest.fixture(scope="module")
def base(one_webui: WebUI) -> np.ndarray:
    return one_webui.draw(TEXT).picture


def test_the_model_draws_a_picture_with_content(base: np.ndarray) -> None:
    assert base.std() > CLEAR


@pytest.mark.parametrize("name", [*GOOD, "loha", "dora"])
def test_a_tag_changes_the_picture_and_its_removal_gives_the_base_bit_for_bit(
    webui: WebUI, base: np.ndarray, name: str
) -> None:
    assert largest_difference(webui.draw(f"{TEXT} <lora:{name}:0.7>").picture, base) > CLEAR
    assert np.array_equal(webui.draw(TEXT).picture, base)


@pytest.mark.parametrize("tags", SAME_AS_BUILTIN)
def test_exact_pictures_are_the_builtin_ones_but_for_rounding(
    webui: WebUI, builtin: Callable[..., Answer], tags: str
) -> None:
    reference = builtin(f"{TEXT} {tags}").picture
    assert largest_difference(webui.draw(f"{TEXT} {tags}").picture, reference) <= ROUNDING


@pytest.mark.parametrize("tags", [*SAME_AS_BUILTIN, "<lora:dora:0.7>", "<lora:a:0.5><lora:a:0.3>"])
def test_compatible_pictures_are_the_builtin_ones_bit_for_bit(
    webui: WebUI, builtin: Callable[..., Answer], tags: str
) -> None:
    reference = builtin(f"{TEXT} {tags}").picture
    with webui.with_options(prefuse_compat="a1111"):
        assert np.array_equal(webui.draw(f"{TEXT} {tags}").picture, reference)


def test_hook_mode_draws_the_fused_picture_but_for_rounding(webui: WebUI, base: np.ndarray) -> None:
    prompt = f"{TEXT} <lora:a:0.6> <lora:b:0.3>"
    fused = webui.draw(prompt).picture
    with webui.with_options(prefuse_mode="hook"):
        hooked = webui.draw(prompt).picture
    assert largest_difference(hooked, base) > CLEAR
    assert largest_difference(hooked, fused) <= ROUNDING
    assert np.array_equal(webui.draw(TEXT).picture, base)


def test_the_builtins_functional_setting_means_hook_mode(webui: WebUI) -> None:
    prompt = f"{TEXT} <lora:a:0.6>"
    with webui.with_options(prefuse_mode="hook"):
        hooked = webui.draw(prompt).picture
    with webui.with_options(lora_functional=True):
        assert np.array_equal(webui.draw(prompt).picture, hooked)


def test_the_order_of_tags_does_not_matter(webui: WebUI) -> None:
    one = webui.draw(f"{TEXT} <lora:a:0.8><lora:b:0.3>").picture
    assert np.array_equal(webui.draw(f"{TEXT} <lora:b:0.3><lora:a:0.8>").picture, one)


def test_strength_zero_is_the_base(webui: WebUI, base: np.ndarray) -> None:
    assert np.array_equal(webui.draw(f"{TEXT} <lora:a:0><lora:b:0>").picture, base)


def test_a_repeated_tag_is_told_and_draws_something_finite(webui: WebUI, base: np.ndarray) -> None:
    answer = webui.draw(f"{TEXT} <lora:a:0.3><lora:a:0.3>")
    assert largest_difference(answer.picture, base) > CLEAR


def test_two_networks_give_the_same_picture_whatever_was_drawn_before(webui: WebUI) -> None:
    prompt = f"{TEXT} <lora:a:0.8><lora:c:0.3>"
    first = webui.draw(prompt).picture
    for other in ("<lora:b:1>", "<lora:a:0.2>", "<lora:d:0.4><lora:a:0.8>", ""):
        webui.draw(f"{TEXT} {other}")
        assert np.array_equal(webui.draw(prompt).picture, first), other


@pytest.mark.slow
def test_a_hundred_random_requests_leave_nothing_behind(webui: WebUI, base: np.ndarray) -> None:
    dice = random.Random(4)
    for _ in range(100):
        names = dice.sample([*GOOD, "loha", "dora", "nosuch", "cutshort", "notfinite"], dice.randint(1, 5))
        kind = dice.choice(("lora", "lyco"))
        tags = "".join(f"<{kind}:{name}:{dice.uniform(-1, 1):.2f}>" for name in names)
        webui.options(prefuse_compat=dice.choice(("exact", "a1111")), prefuse_mode=dice.choice(("auto", "hook")))
        webui.draw(f"{TEXT} {tags}", steps=1, seed=dice.randint(0, 99))
    assert np.array_equal(webui.draw(TEXT).picture, base)
