"""The Train tab in the real WebUI: it trains on the WebUI's checkpoint, in its process, while pictures wait.

TRAINING_ROOT names a folder with a diffusers that goes with the WebUI's transformers; it is added to what WEBUI_PYTHON
has. The WebUI's own accelerate is used.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lib_lora.core.files import read_lora_file
from tests.browser import MISSING as NO_BROWSER
from tests.browser import find_browser
from tests.webui_real.make_models import CHECKPOINTS
from tests.webui_real.make_training import MISSING, PICTURES, SIDE, make_training
from tests.webui_real.server import largest_difference
from tests.webui_real.test_pictures import CLEAR
from tests.webui_real.test_tab import TabDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.browser import Browser
    from tests.webui_real.server import WebUI

STATUS, LINE, PANEL = (f"#prefuse-train-{place}" for place in ("status", "line", "panel"))
STEPS, MANY = 3, 5000
SECONDS = 240
"""In which a training of few steps ends, with what is imported for the first one."""

no_browser = pytest.mark.skipif(find_browser() is None, reason=NO_BROWSER)
trains = pytest.mark.skipif("WEBUI_ROOT" in os.environ and "TRAINING_ROOT" not in os.environ, reason=MISSING)
pytestmark = [no_browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def one_webui(make_webui: Callable[..., WebUI]) -> Iterator[WebUI]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ.get("TRAINING_ROOT", ""))
        webui = make_webui(prepare=make_training)
    yield webui
    webui.stop()


@pytest.fixture
def tab(webui: WebUI, browser: Browser) -> Iterator[TabDriver]:
    tab = TabDriver(browser, f"http://127.0.0.1:{webui.port}/").open()
    tab.sub_tab("Train")
    yield tab
    assert not [error for error in browser.errors if "prefuse" in error]


def fill(tab: TabDriver, name: str, steps: int = STEPS) -> None:
    """Ask for a training on the first checkpoint."""
    tab.choose("train.model", f"{CHECKPOINTS[0]}.safetensors")
    tab.choose("train.pictures", PICTURES)
    for key, text in (("name", name), ("max_train_steps", steps), ("resolution", SIDE), ("learning_rate", 0.05)):
        tab.type(f"train.{key}", str(text))


@trains
def test_a_lora_is_trained_on_the_webuis_checkpoint_and_drawn_with_at_once(tab: TabDriver, webui: WebUI) -> None:
    before = webui.draw("a red circle").picture
    fill(tab, "circles")
    tab.run(
        "[...document.querySelectorAll('#prefuse-tab-train .label-wrap')]"
        ".find((one) => one.textContent.includes('Sample pictures')).click()"
    )
    tab.type("train.sample_prompts", f"a red circle <lora:a:0.5> --s 2 --w {SIDE} --h {SIDE}")
    tab.type("train.sample_every_n_steps", "2")
    assert tab.job("train.start", STATUS, SECONDS).startswith("Done in")
    tab.wait("!!document.querySelector('#prefuse-train-samples img')")
    made = read_lora_file(webui.data / "models/Lora/circles.safetensors").metadata
    assert (made["ss_steps"], made["ss_sd_model_name"]) == (f"{STEPS}", f"{CHECKPOINTS[0]}.safetensors")
    assert np.array_equal(webui.draw("a red circle").picture, before)
    answer = webui.draw("a red circle <lora:circles:1>")
    assert "is not applied" not in answer.told
    assert largest_difference(answer.picture, before) > CLEAR
    tab.click("train.try")
    tab.wait("document.querySelector('#txt2img_prompt textarea').value === '<lora:circles:1>'")
    tab.wait("!!document.querySelector('#txt2img_generate').offsetParent")


@trains
def test_pictures_wait_while_it_trains_and_are_those_from_before(tab: TabDriver, webui: WebUI) -> None:
    wanted = webui.draw("a red circle <lora:a:1>").picture
    fill(tab, "waited", MANY)
    tab.click("train.start")
    tab.wait(f"/Step \\d+ of {MANY}/.test(document.querySelector('{LINE}').innerText)", SECONDS)
    drawn: list[np.ndarray] = []
    request = threading.Thread(target=lambda: drawn.append(webui.draw("a red circle <lora:a:1>").picture))
    request.start()
    tab.click("train.pause")
    tab.wait(f"/Paused/.test(document.querySelector('{LINE}').innerText)")
    request.join(2)
    assert not drawn
    tab.click("train.stop")
    assert tab.job_end(STATUS).startswith("Done in")
    request.join(60)
    assert np.array_equal(drawn[0], wanted)


@trains
def test_a_training_that_is_cancelled_gives_the_model_back(tab: TabDriver, webui: WebUI) -> None:
    wanted = webui.draw("a red circle <lora:a:1>").picture
    fill(tab, "cancelled", MANY)
    tab.click("train.start")
    tab.wait(f"/Step \\d+ of {MANY}/.test(document.querySelector('{LINE}').innerText)", SECONDS)
    tab.click("train.cancel")
    tab.wait(f"/Cancelled/.test(document.querySelector('{STATUS}').innerText)", SECONDS)
    assert not (webui.data / "models/Lora/cancelled.safetensors").exists()
    assert np.array_equal(webui.draw("a red circle <lora:a:1>").picture, wanted)


def test_without_diffusers_the_tab_says_how_to_get_it(make_webui: Callable[..., WebUI], browser: Browser) -> None:
    webui = make_webui(prepare=make_training)
    try:
        tab = TabDriver(browser, f"http://127.0.0.1:{webui.port}/").open()
        tab.sub_tab("Train")
        assert f"Install with: {webui.python} -m pip install diffusers==0.31.0" in tab.text("#prefuse-tab-train")
        fill(tab, "none")
        assert "needed to train: diffusers" in tab.job("train.start", STATUS)
    finally:
        webui.stop()
