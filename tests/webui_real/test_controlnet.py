"""Beside the ControlNet extension, which calls the UNet's parts itself.

Besides WEBUI_ROOT and WEBUI_PYTHON, CONTROLNET_ROOT names the folder of Mikubill/sd-webui-controlnet v1.1.455. The
interpreter needs what that extension imports at its start; models of preprocessors are not used.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.webui_real.make_controlnet import ADAPTER, CONTROLNET, LLLITE, MISSING, make_controlnet
from tests.webui_real.server import largest_difference, text_of
from tests.webui_real.test_passes import HIRES, HIRES_PROMPTS
from tests.webui_real.test_pictures import CLEAR, ROUNDING, TEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.webui_real.server import Answer, WebUI

pytestmark = pytest.mark.skipif("WEBUI_ROOT" in os.environ and "CONTROLNET_ROOT" not in os.environ, reason=MISSING)

KINDS: dict[str, list[dict[str, Any]]] = {
    "ControlNet": [{"model": CONTROLNET}],
    "T2I adapter": [{"model": ADAPTER}],
    "reference": [{"module": "reference_only"}],
    "LLLite": [{"model": LLLITE}],
    "two at once": [{"model": CONTROLNET, "weight": 0.6, "guidance_end": 0.5}, {"model": ADAPTER, "weight": 0.4}],
    "low VRAM": [{"model": CONTROLNET, "low_vram": True}],
}
"""Units that a request has.

A reference is drawn by the UNet itself, which is called twice in each step; LLLite adds to the inputs of layers.
"""
TAGS = "<lora:a:0.8><lora:b:0.3>"
PROMPT = f"{TEXT} {TAGS}"


def controlled(kind: str = "ControlNet", *, inverted: bool = False) -> dict[str, Any]:
    """What a request needs for a white square, or a black one, to steer it."""
    picture = np.full((64, 64, 3), 255 * inverted, np.uint8)
    picture[16:48, 16:48] = 255 * (not inverted)
    common = {"enabled": True, "module": "none", "image": text_of(picture), "save_detected_map": False}
    return {"alwayson_scripts": {"controlnet": {"args": [common | unit for unit in KINDS[kind]]}}}


def add_controlnet(data: Path) -> None:
    """Make ControlNet an extension of a data folder, with models."""
    place = data / "extensions/sd-webui-controlnet"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(Path(os.environ["CONTROLNET_ROOT"]).resolve(), target_is_directory=True)
    make_controlnet(data)


@pytest.fixture(scope="module")
def one_webui(make_webui: Callable[..., WebUI]) -> Iterator[WebUI]:
    """A WebUI with both extensions. LLLite keeps the forwards that it meets at its first use: here the built-in's."""
    webui = make_webui(prepare=add_controlnet)
    webui.draw(PROMPT, **controlled("LLLite"))
    yield webui
    webui.stop()


@pytest.fixture(scope="module")
def base(one_webui: WebUI) -> np.ndarray:
    return one_webui.draw(TEXT).picture


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_the_picture_until_it_is_switched_off(webui: WebUI, base: np.ndarray, kind: str) -> None:
    assert largest_difference(webui.draw(TEXT, **controlled(kind)).picture, base) > CLEAR
    assert np.array_equal(webui.draw(TEXT).picture, base)


@pytest.mark.parametrize("kind", ["ControlNet", "T2I adapter"])
def test_another_control_picture_gives_another_picture(webui: WebUI, kind: str) -> None:
    one, other = (webui.draw(PROMPT, **controlled(kind, inverted=inverted)).picture for inverted in (False, True))
    assert largest_difference(one, other) > CLEAR


@pytest.mark.parametrize("kind", KINDS)
def test_tags_change_the_controlled_picture_and_each_can_go_alone(webui: WebUI, base: np.ndarray, kind: str) -> None:
    control, tagged = webui.draw(TEXT, **controlled(kind)).picture, webui.draw(PROMPT).picture
    both = webui.draw(PROMPT, **controlled(kind)).picture
    for other in (base, control, tagged):
        assert largest_difference(both, other) > CLEAR
    assert np.array_equal(webui.draw(TEXT, **controlled(kind)).picture, control)
    assert np.array_equal(webui.draw(PROMPT, **controlled(kind)).picture, both)
    assert np.array_equal(webui.draw(PROMPT).picture, tagged)
    assert np.array_equal(webui.draw(TEXT).picture, base)


@pytest.mark.parametrize("kind", KINDS)
def test_controlled_pictures_with_tags_are_the_builtin_ones(
    webui: WebUI, builtin: Callable[..., Answer], kind: str
) -> None:
    reference = builtin(PROMPT, **controlled(kind)).picture
    assert largest_difference(webui.draw(PROMPT, **controlled(kind)).picture, reference) <= ROUNDING
    with webui.with_options(prefuse_compat="a1111"):
        assert np.array_equal(webui.draw(PROMPT, **controlled(kind)).picture, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_hook_mode_draws_the_fused_picture_but_for_rounding(webui: WebUI, kind: str) -> None:
    control, fused = (webui.draw(prompt, **controlled(kind)).picture for prompt in (TEXT, PROMPT))
    with webui.with_options(prefuse_mode="hook"):
        assert largest_difference(webui.draw(PROMPT, **controlled(kind)).picture, fused) <= ROUNDING
        assert np.array_equal(webui.draw(TEXT, **controlled(kind)).picture, control)
    assert np.array_equal(webui.draw(PROMPT, **controlled(kind)).picture, fused)


@pytest.mark.parametrize("which", HIRES_PROMPTS)
def test_a_hires_pass_has_both(webui: WebUI, builtin: Callable[..., Answer], which: str) -> None:
    prompt, second = HIRES_PROMPTS[which]
    request = {**HIRES, **controlled(), "hr_prompt": second}
    without = webui.draw(TEXT, **HIRES, **controlled()).picture
    ours = webui.draw(prompt, **request).picture
    assert largest_difference(ours, without) > CLEAR
    assert largest_difference(ours, webui.draw(prompt, **HIRES, hr_prompt=second).picture) > CLEAR
    reference = builtin(prompt, **request).picture
    assert largest_difference(ours, reference) <= ROUNDING
    with webui.with_options(prefuse_compat="a1111"):
        assert np.array_equal(webui.draw(prompt, **request).picture, reference)
    assert np.array_equal(webui.draw(TEXT, **HIRES, **controlled()).picture, without)


def test_img2img_has_both_and_loses_them(webui: WebUI) -> None:
    first = webui.draw(TEXT, seed=7).picture
    webui.redraw(
        TEXT, first, **controlled()
    )  # its model is made, which takes random numbers that the latent is made of
    plain, control = (webui.redraw(TEXT, first, **more).picture for more in ({}, controlled()))
    ours = webui.redraw(PROMPT, first, **controlled()).picture
    with webui.with_options(prefuse_enabled=False):
        reference = webui.redraw(PROMPT, first, **controlled()).picture
    assert largest_difference(ours, control) > CLEAR
    assert largest_difference(ours, webui.redraw(PROMPT, first).picture) > CLEAR
    assert largest_difference(ours, reference) <= ROUNDING
    assert np.array_equal(webui.redraw(TEXT, first, **controlled()).picture, control)
    assert np.array_equal(webui.redraw(TEXT, first).picture, plain)


def test_every_picture_of_a_batch_has_both(webui: WebUI, builtin: Callable[..., Answer]) -> None:
    request = {**controlled(), "n_iter": 2, "batch_size": 2}
    ours, reference = webui.draw(PROMPT, **request).pictures, builtin(PROMPT, **request).pictures
    assert len(ours) == len(reference)
    assert all(largest_difference(one, other) <= ROUNDING for one, other in zip(ours, reference, strict=True))


def test_an_interrupt_leaves_the_next_picture_right(webui: WebUI, base: np.ndarray) -> None:
    control, both = (webui.draw(prompt, **controlled()).picture for prompt in (TEXT, PROMPT))
    for wait in (0.05, 0.3, 0.8):
        webui.draw(TEXT)
        timer = threading.Timer(wait, webui.post, ("/sdapi/v1/interrupt",))
        timer.start()
        webui.draw(PROMPT, steps=20, **controlled())
        timer.join()
        assert np.array_equal(webui.draw(TEXT, **controlled()).picture, control)
        assert np.array_equal(webui.draw(PROMPT, **controlled()).picture, both)
        assert np.array_equal(webui.draw(TEXT).picture, base)


@pytest.mark.slow
def test_thirty_random_requests_give_the_pictures_that_they_give_alone(webui: WebUI, base: np.ndarray) -> None:
    dice = random.Random(5)
    modes = [{"prefuse_mode": "hook"}, {"prefuse_compat": "a1111"}, {}]
    seen: dict[tuple[int, ...], np.ndarray] = {}
    for _ in range(30):
        choice = dice.randrange(2), dice.randrange(4), dice.randrange(3)
        tags = ("", TAGS)[choice[0]]
        control = [{}, *map(controlled, ("ControlNet", "LLLite", "reference"))][choice[1]]
        picture = webui.draw(f"{TEXT} {tags}", **control, override_settings=modes[choice[2]]).picture
        assert np.array_equal(picture, seen.setdefault(choice, picture)), choice
    assert np.array_equal(webui.draw(TEXT).picture, base)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--medvram", "--lowvram"])
def test_both_work_where_the_model_is_moved_in_parts(make_webui: Callable[..., WebUI], flag: str) -> None:
    webui = make_webui(flag, prepare=add_controlnet)
    try:
        base = webui.draw(TEXT).picture
        for kind in ("ControlNet", "low VRAM", "reference"):
            control, both = (webui.draw(prompt, **controlled(kind)).picture for prompt in (TEXT, PROMPT))
            assert largest_difference(both, control) > CLEAR
            with webui.with_options(prefuse_enabled=False):
                assert largest_difference(webui.draw(PROMPT, **controlled(kind)).picture, both) <= ROUNDING
            assert np.array_equal(webui.draw(PROMPT, **controlled(kind)).picture, both)
            assert np.array_equal(webui.draw(TEXT, **controlled(kind)).picture, control)
            assert np.array_equal(webui.draw(TEXT).picture, base)
    finally:
        webui.stop()


def test_nothing_failed_in_the_console(one_webui: WebUI) -> None:
    printed = one_webui.console()
    assert "ControlNet v1.1.455" in printed
    assert "Error running" not in printed
    assert "Error loading script" not in printed
    assert "ControlNet - ERROR" not in printed
