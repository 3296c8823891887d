"""The setting that compiles the UNet in the real WebUI: pictures, switches, other checkpoints, ControlNet beside it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.webui_real.make_models import CHECKPOINTS
from tests.webui_real.server import largest_difference
from tests.webui_real.test_controlnet import KINDS, add_controlnet, controlled
from tests.webui_real.test_pictures import CLEAR, ROUNDING, TEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.webui_real.server import WebUI

pytestmark = pytest.mark.slow

FIRST, SECOND = CHECKPOINTS
BLOCKS = 25
"""Of SD1: 12 on the way in, the middle, 12 on the way out."""
WAIT_SECONDS = 900
PROMPTS = [f"{TEXT} {tags}" for tags in ("", "<lora:a:0.8>", "<lora:b:0.3><lora:a:-0.5>", "<lora:e:0.4>", "")]
ON, OFF = {"prefuse_compile": "inductor"}, {"prefuse_compile": "off"}


def status(webui: WebUI) -> dict[str, Any]:
    return webui.get("/prefuse/v1/state")["compiled"]


def notes(webui: WebUI) -> str:
    """What the last picture was told."""
    return " ".join(webui.get("/prefuse/v1/state")["notes"])


def warm(webui: WebUI, **request: Any) -> None:
    """Draw until nothing new is asked for, and the compiled blocks answer."""
    asked = -1
    while status(webui)["asked"] > asked:
        asked = status(webui)["asked"]
        webui.draw(TEXT, **request)
        end = time.monotonic() + WAIT_SECONDS
        while (now := status(webui))["done"] < now["asked"]:
            assert time.monotonic() < end, now["text"]
            time.sleep(1)
        webui.draw(TEXT, **request)


@pytest.fixture(scope="module")
def one_webui(make_webui: Callable[..., WebUI]) -> Iterator[WebUI]:
    """A WebUI whose UNet was compiled once; with ControlNet, where that is at hand."""
    webui = make_webui(prepare=add_controlnet if "CONTROLNET_ROOT" in os.environ else None)
    webui.draw(TEXT)
    webui.options(**ON)
    warm(webui)
    yield webui
    webui.stop()


@pytest.fixture
def compiled(webui: WebUI) -> Iterator[WebUI]:
    """The same with the setting on and warm."""
    webui.options(**ON)
    warm(webui)
    yield webui
    webui.options(**OFF, sd_model_checkpoint=FIRST)


def test_compiled_pictures_are_the_eager_ones_but_for_rounding_after_every_switch(compiled: WebUI) -> None:
    webui = compiled
    before = status(webui)
    assert len(before["compiled"]) == before["blocks"] == BLOCKS
    drawn = [webui.draw(prompt).picture for prompt in PROMPTS]
    after = status(webui)
    assert (after["recompiles"], after["reason"], after["asked"]) == (0, "", before["asked"])
    assert after["switches"] >= len(PROMPTS) - 1
    webui.options(**OFF)
    eager = [webui.draw(prompt).picture for prompt in PROMPTS]
    assert all(largest_difference(one, other) <= ROUNDING for one, other in zip(drawn, eager, strict=True))
    assert largest_difference(eager[0], eager[1]) > CLEAR


def test_switched_off_the_old_pictures_come_back_bit_for_bit(webui: WebUI) -> None:
    before = [webui.draw(prompt).picture for prompt in PROMPTS]
    webui.options(**ON)
    warm(webui)
    webui.options(**OFF)
    assert all(np.array_equal(webui.draw(prompt).picture, one) for prompt, one in zip(PROMPTS, before, strict=True))
    assert status(webui)["blocks"] == 0


def test_another_size_and_batch_compile_nothing_in_a_picture(compiled: WebUI) -> None:
    webui = compiled
    request = {"width": 128, "height": 64, "batch_size": 2}
    warm(webui, **request)
    ours = webui.draw(PROMPTS[1], **request).pictures
    assert status(webui)["recompiles"] == 0
    webui.options(**OFF)
    eager = webui.draw(PROMPTS[1], **request).pictures
    assert all(largest_difference(one, other) <= ROUNDING for one, other in zip(ours, eager, strict=True))


def test_another_checkpoint_is_drawn_with_its_own_weights(compiled: WebUI) -> None:
    webui = compiled
    first = webui.draw(PROMPTS[1]).picture
    webui.options(sd_model_checkpoint=SECOND)
    warm(webui)
    second = webui.draw(PROMPTS[1]).picture
    assert len(status(webui)["compiled"]) == BLOCKS
    webui.options(**OFF)
    assert largest_difference(webui.draw(PROMPTS[1]).picture, second) <= ROUNDING
    assert largest_difference(first, second) > CLEAR
    webui.options(sd_model_checkpoint=FIRST)
    assert largest_difference(webui.draw(PROMPTS[1]).picture, first) <= ROUNDING


def test_what_would_not_be_seen_by_compiled_code_runs_eagerly_and_is_told(compiled: WebUI) -> None:
    webui = compiled
    tiled = webui.draw(TEXT, tiling=True).picture
    assert notes(webui) == "It runs eagerly while pictures are tiled."
    with webui.with_options(token_merging_ratio=0.5):
        merged = webui.draw(TEXT, width=128).picture
        assert notes(webui) == "It runs eagerly while tokens are merged."
    webui.draw(TEXT)
    assert notes(webui) == ""
    webui.options(**OFF)
    assert np.array_equal(webui.draw(TEXT, tiling=True).picture, tiled)
    with webui.with_options(token_merging_ratio=0.5):
        assert np.array_equal(webui.draw(TEXT, width=128).picture, merged)


def test_hook_mode_runs_eagerly(compiled: WebUI) -> None:
    webui = compiled
    with webui.with_options(prefuse_mode="hook"):
        ours = webui.draw(PROMPTS[1]).picture
    assert "hooked" in status(webui)["reason"]
    webui.draw(TEXT)
    assert status(webui)["reason"] == ""
    webui.options(**OFF)
    with webui.with_options(prefuse_mode="hook"):
        assert largest_difference(webui.draw(PROMPTS[1]).picture, ours) <= ROUNDING


@pytest.mark.skipif("CONTROLNET_ROOT" not in os.environ, reason="see test_controlnet.py")
@pytest.mark.parametrize("kind", KINDS)
def test_controlnet_beside_it_draws_what_it_draws_eagerly(compiled: WebUI, kind: str) -> None:
    webui = compiled
    warm(webui, **controlled(kind))
    drawn = [webui.draw(prompt, **controlled(kind)).picture for prompt in PROMPTS[:3]]
    plain = webui.draw(PROMPTS[1]).picture
    assert status(webui)["recompiles"] == 0
    webui.options(**OFF)
    eager = [webui.draw(prompt, **controlled(kind)).picture for prompt in PROMPTS[:3]]
    assert all(largest_difference(one, other) <= ROUNDING for one, other in zip(drawn, eager, strict=True))
    assert largest_difference(webui.draw(PROMPTS[1]).picture, plain) <= ROUNDING


def test_the_compiled_code_is_in_the_webuis_folder(one_webui: WebUI) -> None:
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        assert any((one_webui.data / "cache/prefuse/inductor").iterdir())


def test_reloading_the_page_gives_the_model_back_and_it_is_compiled_again(compiled: WebUI) -> None:
    webui = compiled
    ours = webui.draw(PROMPTS[1]).picture
    webui.reload_page()
    assert status(webui)["blocks"] == 0
    warm(webui)
    assert len(status(webui)["compiled"]) == BLOCKS
    assert largest_difference(webui.draw(PROMPTS[1]).picture, ours) <= ROUNDING


@pytest.mark.parametrize("flag", ["--medvram", "--lowvram"])
def test_a_model_that_is_moved_in_parts_is_refused_with_a_sentence(make_webui: Callable[..., WebUI], flag: str) -> None:
    webui = make_webui(flag)
    try:
        before = webui.draw(PROMPTS[1]).picture
        webui.options(**ON)
        answer = webui.draw(PROMPTS[1])
        assert np.array_equal(answer.picture, before)
        assert "--medvram and --lowvram" in answer.told
        assert "--medvram and --lowvram" not in answer.infotext
        assert status(webui)["blocks"] == 0
    finally:
        webui.stop()
