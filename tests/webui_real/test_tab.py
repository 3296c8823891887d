"""Our tab in the real WebUI: its folders, its models, its pictures, its queue."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.browser import MISSING, Browser, find_browser
from tests.ui.driver import PageDriver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.webui_real.server import WebUI

pytestmark = pytest.mark.skipif(find_browser() is None, reason=MISSING)

PROMPT = "a cube"
COMPARE = "#prefuse-blocks-compare-form"
MAIN_TAB = "[...document.querySelectorAll('#tabs > .tab-nav > button')].find((one) => one.textContent.trim() === {!r})"
PICTURES = "#prefuse-blocks-gallery img"
LONG_STEPS = 40


class TabDriver(PageDriver):
    """The tab in the WebUI's page."""

    def open(self, theme: str = "light", width: int = 1280, height: int = 1000) -> TabDriver:
        self.browser.resize(width, height)
        self.browser.open(f"{self.address}?__theme={theme}")
        self.wait("!!document.querySelector('#txt2img_generate')?.offsetParent && window.prefuseTab")
        self.run(f"{MAIN_TAB.format('Prefuse')}.click()")
        self.wait("!!document.getElementById('prefuse-tabs')?.offsetParent")
        return self


@pytest.fixture
def tab(webui: WebUI, browser: Browser) -> Iterator[TabDriver]:
    yield TabDriver(browser, f"http://127.0.0.1:{webui.port}/").open()
    assert not [error for error in browser.errors if "prefuse" in error]


def compare(tab: TabDriver, steps: int) -> None:
    tab.sub_tab("Block weights")
    tab.choose("blocks.lora", "a")
    tab.type("blocks.prompt", PROMPT)
    tab.type("blocks.seed", "3")
    tab.type("blocks.steps", str(steps))
    tab.click("blocks.start")


def shown(tab: TabDriver) -> list[np.ndarray]:
    """The pictures of the gallery, as the browser has them."""
    data = tab.wait(
        f"""(() => {{
            const pictures = [...document.querySelectorAll('{PICTURES}')];
            if (pictures.length < 2 || pictures.some((one) => !one.naturalWidth)) return null;
            return pictures.slice(0, 2).map((one) => {{
                const canvas = document.createElement('canvas');
                [canvas.width, canvas.height] = [one.naturalWidth, one.naturalHeight];
                canvas.getContext('2d').drawImage(one, 0, 0);
                return [canvas.width, canvas.height, [...canvas.getContext('2d')
                    .getImageData(0, 0, canvas.width, canvas.height).data]];
            }});
        }})()"""
    )
    return [np.array(pixels, np.uint8).reshape(height, width, 4)[..., :3] for width, height, pixels in data]


def test_the_tab_has_all_but_the_drawing_that_txt2img_does(tab: TabDriver) -> None:
    titles = tab.texts("#prefuse-tabs > .tab-nav > button")
    assert titles == ["Block weights", "Analyse", "Workshop", "Inspect"]


def test_two_weights_are_compared_in_pictures_that_txt2img_would_make(tab: TabDriver, webui: WebUI) -> None:
    compare(tab, 2)
    assert tab.job_end(COMPARE).startswith("Done in")
    left, right = shown(tab)
    size = {"width": left.shape[1], "height": left.shape[0]}
    assert (left == webui.draw(f"{PROMPT} <lora:a:1>", seed=3, **size).picture).all()
    assert (right == webui.draw(PROMPT, seed=3, **size).picture).all()
    assert (left != right).any()


def test_a_job_of_the_tab_is_cancelled_and_the_next_picture_is_whole(tab: TabDriver, webui: WebUI) -> None:
    before = webui.draw(f"{PROMPT} <lora:b:0.5>").picture
    compare(tab, LONG_STEPS)
    tab.wait(f"document.querySelector('{COMPARE} progress')?.value > 0")
    tab.click("blocks.stop")
    assert tab.job_end(COMPARE).startswith("Cancelled after")
    assert (webui.draw(f"{PROMPT} <lora:b:0.5>").picture == before).all()


def test_pictures_of_txt2img_and_of_the_tab_wait_for_each_other(tab: TabDriver, webui: WebUI) -> None:
    wanted = webui.draw(f"{PROMPT} <lora:b:0.5>", steps=LONG_STEPS).picture
    answers: list[np.ndarray] = []
    request = threading.Thread(
        target=lambda: answers.append(webui.draw(f"{PROMPT} <lora:b:0.5>", steps=LONG_STEPS).picture)
    )
    request.start()
    compare(tab, 2)
    assert tab.job_end(COMPARE).startswith("Done in")
    request.join()
    assert (answers[0] == wanted).all()


def test_a_merged_checkpoint_can_be_chosen_and_draws_what_the_prompt_did(
    tab: TabDriver, webui: WebUI, tmp_path: Path
) -> None:
    wanted = webui.draw(f"{PROMPT} <lora:a:0.7>").picture
    model = webui.get("/sdapi/v1/options")["sd_model_checkpoint"]
    name = model.partition(".safetensors")[0]
    tab.sub_tab("Workshop")
    tab.choose("workshop.merge.model", f"{name}.safetensors")
    tab.type("workshop.merge.loras", "<lora:a:0.7>")
    tab.type("workshop.merge.name", "baked-in-the-tab")
    tab.click("workshop.merge.start")
    assert tab.job_end("#prefuse-workshop-merge").startswith("Done in")
    tab.click("workshop.merge.use")
    tab.wait(
        "/baked-in-the-tab/.test(document.querySelector('#setting_sd_model_checkpoint input')?.value ?? '')"
        " || /baked-in-the-tab/.test(document.querySelector('#prefuse-workshop-merge').innerText)"
    )
    try:
        with webui.with_options(sd_model_checkpoint="baked-in-the-tab.safetensors"):
            picture = webui.draw(PROMPT).picture
        Image.fromarray(picture).save(tmp_path / "baked.png")
        assert np.abs(picture.astype(int) - wanted).max() <= 1
    finally:
        webui.options(sd_model_checkpoint=model)
        (webui.data / "models" / "Stable-diffusion" / "baked-in-the-tab.safetensors").unlink()


def test_presets_are_saved_where_the_prompt_finds_them(tab: TabDriver, webui: WebUI) -> None:
    tab.sub_tab("Block weights")
    tab.choose("blocks.lora", "a")
    weights = ["0.5", *["1"] * 16]
    tab.type("blocks.list", ",".join(weights))
    tab.type("blocks.name", "FROMTAB")
    tab.click("blocks.save")
    tab.wait(
        "/FROMTAB/.test(document.querySelector('#prefuse').innerText) || "
        "/FROMTAB/.test(document.querySelector('#prefuse-blocks-preset input')?.value ?? '')"
    )
    answer = webui.post("/prefuse/v1/resolve", prompt="<lora:a:1:lbw=FROMTAB>")
    assert not answer["refused"]
    assert answer["applied"][0]["weights"].startswith("lbw=0.5,")
