"""Other weights under the same LoRAs: checkpoint switches, refiner, VAE, 8-bit storage, embeddings inside of LoRAs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.webui_real.make_models import BUNDLE, CHECKPOINTS, OTHER_VAE, WORD
from tests.webui_real.server import largest_difference
from tests.webui_real.test_pictures import CLEAR, ROUNDING, TEXT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.webui_real.server import Answer, WebUI

PROMPT = f"{TEXT} <lora:a:0.6><lora:b:0.2>"
FIRST, SECOND = CHECKPOINTS
HASHES = "TI hashes"
AS_GOOD = 1.5
"""Times the built-in's mean distance to the picture of fp32 weights; of both, nearly all is what 8 bits cost."""
REFINED = {"refiner_checkpoint": SECOND, "refiner_switch_at": 0.5, "steps": 4}


@pytest.fixture
def first_checkpoint(webui: WebUI) -> WebUI:
    yield webui
    webui.options(sd_model_checkpoint=FIRST)


def test_another_checkpoint_has_the_tags_and_its_own_base(first_checkpoint: WebUI) -> None:
    webui = first_checkpoint
    base, ours = webui.draw(TEXT).picture, webui.draw(PROMPT).picture
    webui.options(sd_model_checkpoint=SECOND)
    second = webui.draw(PROMPT).picture
    with webui.with_options(prefuse_enabled=False):
        assert largest_difference(webui.draw(PROMPT).picture, second) <= ROUNDING
        plain = webui.draw(TEXT).picture
    assert largest_difference(plain, base) > CLEAR
    assert np.array_equal(webui.draw(TEXT).picture, plain)
    webui.draw(PROMPT)
    webui.options(sd_model_checkpoint=FIRST)
    assert np.array_equal(webui.draw(TEXT).picture, base)
    assert np.array_equal(webui.draw(PROMPT).picture, ours)


def test_a_checkpoint_for_one_request_has_the_tags(first_checkpoint: WebUI, builtin: Callable[..., Answer]) -> None:
    webui, once = first_checkpoint, {"override_settings": {"sd_model_checkpoint": SECOND}}
    base, ours = webui.draw(TEXT).picture, webui.draw(PROMPT).picture
    assert largest_difference(webui.draw(PROMPT, **once).picture, builtin(PROMPT, **once).picture) <= ROUNDING
    assert np.array_equal(webui.draw(PROMPT).picture, ours)
    webui.draw(PROMPT, **once)
    assert np.array_equal(webui.draw(TEXT).picture, base)


def test_a_refiner_has_the_tags_and_both_models_lose_them(first_checkpoint: WebUI) -> None:
    webui = first_checkpoint
    plain, base = webui.draw(TEXT, **REFINED).picture, webui.draw(TEXT).picture
    ours = webui.draw(PROMPT, **REFINED).picture
    assert largest_difference(ours, plain) > CLEAR
    assert np.array_equal(webui.draw(TEXT, **REFINED).picture, plain)
    with webui.with_options(prefuse_enabled=False):
        assert np.array_equal(webui.draw(TEXT, **REFINED).picture, plain)
    assert np.array_equal(webui.draw(PROMPT, **REFINED).picture, ours)
    assert np.array_equal(webui.draw(TEXT).picture, base)
    webui.options(sd_model_checkpoint=SECOND)
    second = webui.draw(TEXT).picture
    with webui.with_options(prefuse_enabled=False):
        assert np.array_equal(webui.draw(TEXT).picture, second)


@pytest.mark.slow
def test_a_refiner_that_stays_in_memory_draws_as_the_builtin_does(make_webui: Callable[..., WebUI]) -> None:
    """In its own process: with two models in memory the WebUI takes the VAE of one for the other's later on.

    With one model in memory the built-in draws another picture than with two; ours is the same in both.
    """
    webui = make_webui()
    try:
        one = webui.draw(PROMPT, **REFINED).picture
        webui.options(sd_checkpoints_limit=2)
        plain, ours = webui.draw(TEXT, **REFINED).picture, webui.draw(PROMPT, **REFINED).picture
        assert np.array_equal(ours, one)
        with webui.with_options(prefuse_enabled=False):
            assert largest_difference(webui.draw(PROMPT, **REFINED).picture, ours) <= ROUNDING
        assert np.array_equal(webui.draw(PROMPT, **REFINED).picture, ours)
        assert np.array_equal(webui.draw(TEXT, **REFINED).picture, plain)
    finally:
        webui.stop()


def test_another_vae_changes_nothing_of_the_tags(webui: WebUI, builtin: Callable[..., Answer]) -> None:
    base, ours = webui.draw(TEXT).picture, webui.draw(PROMPT).picture
    webui.options(sd_vae=OTHER_VAE)
    other = webui.draw(PROMPT).picture
    assert largest_difference(other, ours) > CLEAR
    assert largest_difference(builtin(PROMPT).picture, other) <= ROUNDING
    webui.options(sd_vae="Automatic")
    assert np.array_equal(webui.draw(PROMPT).picture, ours)
    assert np.array_equal(webui.draw(TEXT).picture, base)


@pytest.mark.parametrize("mode", ["prefuse", "hook"])
@pytest.mark.parametrize("master", [False, True])
def test_weights_in_eight_bits_take_a_tag_as_well_as_the_builtin_and_lose_it(
    webui: WebUI, builtin: Callable[..., Answer], master: bool, mode: str
) -> None:
    prompt = f"{TEXT} <lora:a:0.6>"
    exact = webui.draw(prompt).picture.astype(int)
    with webui.with_options(fp8_storage="Enable", cache_fp16_weight=master, prefuse_mode=mode):
        plain, ours, reference = webui.draw(TEXT).picture, webui.draw(prompt).picture, builtin(prompt).picture
        assert np.abs(ours - exact).mean() <= AS_GOOD * np.abs(reference - exact).mean()
        assert np.array_equal(webui.draw(TEXT).picture, plain)
        assert np.array_equal(webui.draw(prompt).picture, ours)


@pytest.mark.parametrize("master", [False, True])
def test_compatible_pictures_from_eight_bits_are_the_builtin_ones_bit_for_bit(
    webui: WebUI, builtin: Callable[..., Answer], master: bool
) -> None:
    with webui.with_options(fp8_storage="Enable", cache_fp16_weight=master, prefuse_compat="a1111"):
        for name in ("a", "b", "loha", "dora"):
            prompt = f"{TEXT} <lora:{name}:0.6>"
            assert np.array_equal(webui.draw(prompt).picture, builtin(prompt).picture), name


def test_an_embedding_inside_of_a_lora_is_there_while_the_lora_is(webui: WebUI, builtin: Callable[..., Answer]) -> None:
    plain = webui.draw(f"{TEXT} {WORD}")
    ours = webui.draw(f"{TEXT} {WORD} <lora:{BUNDLE}:0.5>")
    reference = builtin(f"{TEXT} {WORD} <lora:{BUNDLE}:0.5>")
    assert largest_difference(ours.picture, reference.picture) <= ROUNDING
    assert ours.infotext == reference.infotext
    assert HASHES in ours.parameters
    assert HASHES not in plain.parameters
    again = webui.draw(f"{TEXT} {WORD}")
    assert np.array_equal(again.picture, plain.picture)
    assert HASHES not in again.parameters
