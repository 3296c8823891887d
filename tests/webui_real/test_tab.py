"""Our tab in the real WebUI: its folders, its models, its pictures, its queue."""

from __future__ import annotations

import base64
import io
import shutil
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
FORM = "#prefuse-tab-analyse"
PICTURES = "#prefuse-analyse-pictures img"
BLOCK = "M00"
SIDE = 64
LONG_STEPS = 60
MAIN_TAB = "[...document.querySelectorAll('#tabs > .tab-nav > button')].find((one) => one.textContent.trim() === {!r})"


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


def draw(tab: TabDriver, steps: int) -> None:
    """Begin the pictures of one block of LoRA a: without it, whole, and that block alone."""
    tab.sub_tab("Analyse")
    tab.choose("analyse.lora", "a")
    tab.job_end(FORM)
    boxes = "[...document.querySelectorAll('#prefuse-analyse-blocks label')]"
    box = f"{boxes}.find((one) => one.textContent.includes('{BLOCK}'))"
    tab.wait(f"!!{box}")
    tab.run(f"{box}.click()")
    tab.type("analyse.prompt", PROMPT)
    tab.type("analyse.seed", "3")
    for name, number in (("steps", steps), ("width", SIDE), ("height", SIDE)):
        tab.type(f"analyse.{name}", str(number))
    tab.click("analyse.start")


def shown(tab: TabDriver) -> list[np.ndarray]:
    """The pictures as the browser has them: without the LoRA, whole, its difference, of the block, its difference."""
    data = tab.wait(
        f"""(() => {{
            const pictures = [...document.querySelectorAll('{PICTURES}')];
            if (pictures.length !== 5 || pictures.some((one) => !one.naturalWidth)) return null;
            return pictures.map((one) => one.src);
        }})()""",
        120,
    )
    files = [io.BytesIO(base64.b64decode(source.partition(",")[2])) for source in data]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def test_the_tab_has_all_but_the_drawing_that_txt2img_does(tab: TabDriver) -> None:
    titles = tab.texts("#prefuse-tabs > .tab-nav > button")
    assert titles == ["Block weights", "Analyse", "Workshop", "Train", "Inspect"]


def test_pictures_of_blocks_are_those_that_txt2img_makes(tab: TabDriver, webui: WebUI) -> None:
    draw(tab, 2)
    without, whole, _, block, _ = shown(tab)
    alone = ",".join("1" if number == 7 else "0" for number in range(17))
    assert (without == webui.draw(PROMPT, seed=3).picture).all()
    assert (whole == webui.draw(f"{PROMPT} <lora:a:1>", seed=3).picture).all()
    assert (block == webui.draw(f"{PROMPT} <lora:a:1:lbw={alone}>", seed=3).picture).all()
    assert (whole != without).any()


def test_a_job_of_the_tab_is_cancelled_and_the_next_picture_is_whole(tab: TabDriver, webui: WebUI) -> None:
    before = webui.draw(f"{PROMPT} <lora:b:0.5>").picture
    draw(tab, LONG_STEPS)
    tab.wait(f"document.querySelector('{FORM} progress')?.value > 0", 120)
    tab.click("analyse.interrupt")
    tab.wait(f"document.querySelector('{FORM}').textContent.includes('Cancelled after')", 60)
    assert (webui.draw(f"{PROMPT} <lora:b:0.5>").picture == before).all()


@pytest.mark.parametrize("is_closed", [True, False])
def test_the_webui_reloads_its_page_while_a_job_of_the_tab_runs(tab: TabDriver, webui: WebUI, is_closed: bool) -> None:
    before = webui.draw(f"{PROMPT} <lora:b:0.5>").picture
    draw(tab, LONG_STEPS)
    tab.wait(f"document.querySelector('{FORM} progress')?.value > 0", 120)
    if is_closed:
        tab.browser.open("about:blank")
    webui.reload_page()
    assert (webui.draw(f"{PROMPT} <lora:b:0.5>").picture == before).all()
    tab.open().sub_tab("Analyse")
    tab.click("analyse.interrupt")
    assert tab.job_end(FORM), "the new page shows the job"


def test_pictures_of_txt2img_and_of_the_tab_wait_for_each_other(tab: TabDriver, webui: WebUI) -> None:
    wanted = webui.draw(f"{PROMPT} <lora:b:0.5>", steps=LONG_STEPS).picture
    answers: list[np.ndarray] = []
    request = threading.Thread(
        target=lambda: answers.append(webui.draw(f"{PROMPT} <lora:b:0.5>", steps=LONG_STEPS).picture)
    )
    request.start()
    draw(tab, 2)
    assert (shown(tab)[0] == webui.draw(PROMPT, seed=3).picture).all()
    request.join()
    assert (answers[0] == wanted).all()


def test_a_merged_checkpoint_can_be_chosen_and_draws_what_the_prompt_did(
    tab: TabDriver, webui: WebUI, tmp_path: Path
) -> None:
    wanted = webui.draw(f"{PROMPT} <lora:a:0.7>").picture
    model = webui.get("/sdapi/v1/options")["sd_model_checkpoint"]
    name = model.partition(".safetensors")[0]
    folder = webui.data / "models" / "Stable-diffusion"
    config = folder / f"{name}.yaml"  # the small model is of no size that the WebUI knows
    shutil.copyfile(config, folder / "baked-in-the-tab.yaml")
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
        for file in folder.glob("baked-in-the-tab.*"):
            file.unlink()


def test_presets_are_saved_where_the_prompt_finds_them(tab: TabDriver, webui: WebUI) -> None:
    tab.sub_tab("Block weights")
    tab.choose("blocks.lora", "a")
    tab.wait("document.querySelector('#prefuse-blocks-tag')?.textContent.includes('<lora:a:1>')")
    weights = ["0.5", *["1"] * 16]
    tab.type("blocks.list", ",".join(weights))
    tab.type("blocks.name", "FROMTAB")
    tab.click("blocks.save")
    tab.wait(
        "/FROMTAB/.test(document.querySelector('#prefuse').innerText) || "
        "/FROMTAB/.test(document.querySelector('#prefuse-blocks-preset input')?.value ?? '')"
    )
    answer = webui.post("/prefuse/v1/resolve", {"prompt": "<lora:a:1:lbw=FROMTAB>"})
    assert not answer["refused"]
    assert answer["applied"][0]["weights"].startswith("lbw=0.5,")
