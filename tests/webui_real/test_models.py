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


@pytest.mark.parametrize("kept", [1, 2])
def test_a_refiner_has_the_tags_and_both_models_lose_them(
    first_checkpoint: WebUI, builtin: Callable[..., Answer], kept: int
) -> None:
    webui = first_checkpoint
    with webui.with_options(sd_checkpoints_limit=kept):
        plain, base = webui.draw(TEXT, **REFINED).picture, webui.draw(TEXT).picture
        ours = webui.draw(PROMPT, **REFINED).picture
        assert largest_difference(ours, plain) > CLEAR
        assert np.array_equal(webui.draw(TEXT, **REFINED).picture, plain)
        assert largest_difference(builtin(PROMPT, **REFINED).picture, ours) <= ROUNDING
        assert np.array_equal(webui.draw(PROMPT, **REFINED).picture, ours)
        assert np.array_equal(webui.draw(TEXT).picture, base)
        webui.options(sd_model_checkpoint=SECOND)
        second = webui.draw(TEXT).picture
        with webui.with_options(prefuse_enabled=False):
            assert np.array_equal(webui.draw(TEXT).picture, second)


def test_another_vae_changes_nothing_of_the_tags(webui: WebUI, builtin: Callable[..., Answer]) -> None:
    base, ours = webui.draw(TEXT).picture, webui.draw(PROMPT).picture
    webui.options(sd_vae=OTHER_VAE)
    other = webui.draw(PROMPT).picture
    assert largest_difference(other, ours) > CLEAR
    assert largest_difference(builtin(PROMPT).picture, other) <= ROUNDING
    webui.options(sd_vae="Automatic")
    assert np.array_equal(webui.draw(PROMPT).picture, ours)
    assert np.array_equal(webui.draw(TEXT).picture, base)


@pytest.mark.parametrize("master", [False, True])
def test_weights_in_eight_bits_take_tags_and_lose_them(
    webui: WebUI, builtin: Callable[..., Answer], master: bool
) -> None:
    base = webui.draw(TEXT).picture
    with webui.with_options(fp8_storage="Enable", cache_fp16_weight=master):
        plain, ours = webui.draw(TEXT).picture, webui.draw(PROMPT).picture
        assert largest_difference(ours, plain) > CLEAR
        assert np.array_equal(webui.draw(TEXT).picture, plain)
        with webui.with_options(prefuse_compat="a1111"):
            compatible = webui.draw(PROMPT).picture
        assert np.array_equal(builtin(PROMPT).picture, compatible)
        assert np.array_equal(webui.draw(TEXT).picture, plain)
    assert np.array_equal(webui.draw(TEXT).picture, base)


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
