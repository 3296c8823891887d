"""Where LoRAs apply in one request: first and second pass, img2img, inpainting, batches."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.webui_real.server import largest_difference, text_of
from tests.webui_real.test_pictures import CLEAR, ROUNDING, TEXT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.webui_real.server import Answer, WebUI

HIRES: dict[str, Any] = {
    "enable_hr": True,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 2,
    "denoising_strength": 0.7,
}
HIRES_PROMPTS = {
    "of its own": (f"{TEXT} <lora:a:0.6>", f"{TEXT} <lora:b:0.5>"),
    "of the first pass": (f"{TEXT} <lora:a:0.6>", ""),
    "of the first pass alone": (f"{TEXT} <lora:a:0.6>", TEXT),
    "of the second pass alone": (TEXT, f"{TEXT} <lora:b:0.5>"),
}


@pytest.mark.parametrize("which", HIRES_PROMPTS)
def test_a_hires_pass_has_the_tags(webui: WebUI, builtin: Callable[..., Answer], which: str) -> None:
    prompt, second = HIRES_PROMPTS[which]
    request = {**HIRES, "hr_prompt": second}
    reference = builtin(prompt, **request).picture
    ours = webui.draw(prompt, **request).picture
    assert ours.shape == (128, 128, 3)
    assert largest_difference(ours, reference) <= ROUNDING
    with webui.with_options(prefuse_compat="a1111"):
        assert np.array_equal(webui.draw(prompt, **request).picture, reference)


def test_tags_of_the_hires_pass_alone_change_the_picture_and_stay_there(webui: WebUI) -> None:
    base, without = webui.draw(TEXT).picture, webui.draw(TEXT, **HIRES).picture
    own = webui.draw(TEXT, **HIRES, hr_prompt=f"{TEXT} <lora:b:0.5>").picture
    assert largest_difference(own, without) > CLEAR
    assert np.array_equal(webui.draw(TEXT).picture, base)
    assert np.array_equal(webui.draw(TEXT, **HIRES).picture, without)


def test_img2img_has_the_tags_and_loses_them(webui: WebUI) -> None:
    first = webui.draw(TEXT, seed=7).picture
    plain = webui.redraw(TEXT, first).picture
    ours = webui.redraw(f"{TEXT} <lora:a:0.8>", first).picture
    with webui.with_options(prefuse_enabled=False):
        reference = webui.redraw(f"{TEXT} <lora:a:0.8>", first).picture
    assert largest_difference(ours, plain) > CLEAR
    assert largest_difference(ours, reference) <= ROUNDING
    assert np.array_equal(webui.redraw(TEXT, first).picture, plain)


def test_inpainting_has_the_tags_and_loses_them(webui: WebUI) -> None:
    first = webui.draw(TEXT, seed=7).picture
    mask = np.zeros_like(first)
    mask[:, 32:] = 255
    request = {"mask": text_of(mask), "inpainting_fill": 1}
    plain = webui.redraw(TEXT, first, **request).picture
    ours = webui.redraw(f"{TEXT} <lora:a:0.8>", first, **request).picture
    with webui.with_options(prefuse_enabled=False):
        reference = webui.redraw(f"{TEXT} <lora:a:0.8>", first, **request).picture
    assert largest_difference(ours, plain) > CLEAR
    assert largest_difference(ours, reference) <= ROUNDING
    assert np.array_equal(webui.redraw(TEXT, first, **request).picture, plain)


@pytest.mark.parametrize("batch", [{"n_iter": 2}, {"batch_size": 2}, {"n_iter": 2, "batch_size": 2}])
def test_every_picture_of_a_batch_has_the_tags(
    webui: WebUI, builtin: Callable[..., Answer], batch: dict[str, int]
) -> None:
    prompt = f"{TEXT} <lora:a:0.6><lora:b:0.2>"
    plain, ours, reference = webui.draw(TEXT, **batch), webui.draw(prompt, **batch), builtin(prompt, **batch)
    assert len(ours.pictures) == len(reference.pictures) == len(plain.pictures)
    for own, theirs, without in zip(ours.pictures, reference.pictures, plain.pictures, strict=True):
        assert largest_difference(own, without) > CLEAR
        assert largest_difference(own, theirs) <= ROUNDING
    again = webui.draw(TEXT, **batch).pictures
    assert all(np.array_equal(one, other) for one, other in zip(again, plain.pictures, strict=True))


def test_a_negative_prompt_is_encoded_with_the_tags(webui: WebUI, builtin: Callable[..., Answer]) -> None:
    prompt, negative = f"{TEXT} <lora:e:0.8:0>", {"negative_prompt": "blurry, (dark:1.3)"}
    plain = webui.draw(TEXT, **negative).picture
    ours = webui.draw(prompt, **negative).picture
    assert largest_difference(ours, plain) > CLEAR
    assert largest_difference(ours, builtin(prompt, **negative).picture) <= ROUNDING


def test_the_same_text_is_encoded_again_when_only_the_mode_changed(webui: WebUI) -> None:
    prompt = f"{TEXT} <lora:dora:0.5><lora:e:0.8>"
    exact = webui.draw(prompt).picture
    with webui.with_options(prefuse_compat="a1111"):
        compatible = webui.draw(prompt).picture
    assert np.array_equal(webui.draw(prompt).picture, exact)
    with webui.with_options(prefuse_compat="a1111"):
        assert np.array_equal(webui.draw(prompt).picture, compatible)


def test_settings_of_one_request_end_with_it(webui: WebUI) -> None:
    prompt = f"{TEXT} <lora:a:0.6>"
    plain, ours = webui.draw(TEXT).picture, webui.draw(prompt).picture
    for one in ({"prefuse_enabled": False}, {"prefuse_mode": "hook"}, {"prefuse_compat": "a1111"}):
        changed = webui.draw(prompt, override_settings=one).picture
        assert largest_difference(changed, ours) <= ROUNDING, one
        assert np.array_equal(webui.draw(prompt).picture, ours), one
        webui.draw(prompt, override_settings=one)
        assert np.array_equal(webui.draw(TEXT).picture, plain), one


def test_a_model_that_was_unloaded_and_loaded_again_draws_the_same(webui: WebUI) -> None:
    prompt = f"{TEXT} <lora:a:0.6>"
    plain, ours = webui.draw(TEXT).picture, webui.draw(prompt).picture
    webui.post("/sdapi/v1/unload-checkpoint")
    webui.post("/sdapi/v1/reload-checkpoint")
    assert np.array_equal(webui.draw(TEXT).picture, plain)
    assert np.array_equal(webui.draw(prompt).picture, ours)
    assert np.array_equal(webui.draw(TEXT).picture, plain)


def test_an_interrupt_leaves_the_next_picture_right(webui: WebUI) -> None:
    plain = webui.draw(TEXT).picture
    prompt = f"{TEXT} <lora:a:0.6><lora:d:0.3>"
    ours = webui.draw(prompt).picture
    for wait in (0.05, 0.2, 0.5):
        webui.draw(TEXT)
        timer = threading.Timer(wait, webui.post, ("/sdapi/v1/interrupt",))
        timer.start()
        webui.draw(prompt, steps=20)
        timer.join()
        assert np.array_equal(webui.draw(TEXT).picture, plain)
        assert np.array_equal(webui.draw(prompt).picture, ours)
