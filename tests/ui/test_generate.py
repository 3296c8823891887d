"""The sub-tab that makes pictures, in a browser."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from lib_lora.hosts.standalone.demo import MODEL_DIR
from lib_lora.hosts.standalone.infotext import parse_infotext
from tests.ui.driver import place

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ui.driver import PageDriver
    from tests.ui.serving import PageServer

FORM = "#prefuse-generate-status"
PICTURES = "#prefuse-generate-gallery img"
MODEL = "#prefuse-generate-model-status"
REPORT = "#prefuse-generate-report"
CTRL = 2
INFOTEXT = (
    "a green square <lora:stripes:0.5>\nNegative prompt: blue\n"
    "Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.5, Seed: 77, Size: 72x80, Version: v1.10.1"
)


def draw(page: PageDriver, prompt: str, steps: int = 2) -> str:
    """What is said at the end of a drawing."""
    page.type("generate.prompt", prompt)
    page.slide("generate.steps", steps)
    return page.job("generate.start", FORM)


def test_a_prompt_becomes_a_picture_with_the_report_of_its_loras(page: PageDriver, server: PageServer) -> None:
    before = set(server.outputs.glob("*.png"))
    assert draw(page, "a red circle <lora:stripes:0.5> <lora:nosuch:1>").startswith("Done in")
    assert page.wait(f"document.querySelector('{PICTURES}')?.naturalWidth") == 64
    lines = page.texts(f"{REPORT} .prefuse-report li")
    assert lines[0].startswith("+ stripes at 0.5: LoRA rank 8")
    assert "nosuch" in lines[1]
    assert "base weights" in lines[-1]
    assert len(set(server.outputs.glob("*.png")) - before) == 1


def test_the_infotext_below_a_picture_is_copied_by_its_button_and_draws_it_again(page: PageDriver) -> None:
    draw(page, "a red circle <lora:stripes:0.5>")
    seed = parse_infotext(page.text(f"{REPORT} code")).parameters["Seed"]
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.browser.click(f"{REPORT} .prefuse-copy")
    copied = page.wait("window.copied")
    assert f"Seed: {seed}" in copied
    page.click("generate.last")
    page.wait(f"document.querySelector('{place('generate.seed')} input').value === '{seed}'", 10)
    page.click("generate.random")
    page.wait(f"document.querySelector('{place('generate.seed')} input').value === '-1'", 10)
    page.type("generate.prompt", copied)
    page.click("generate.read")
    page.wait(f"document.querySelector('{place('generate.seed')} input').value === '{seed}'", 10)
    assert page.value("generate.prompt") == "a red circle <lora:stripes:0.5>"


def test_a_drawing_can_be_interrupted_and_the_last_pictures_stay(page: PageDriver, server: PageServer) -> None:
    draw(page, "a red circle")
    page.wait(f"document.querySelector('{PICTURES}')?.naturalWidth")
    kept = page.run(f"document.querySelector('{PICTURES}').src")
    before = set(server.outputs.glob("*.png"))
    page.slide("generate.steps", 150)
    page.click("generate.start")
    page.wait(f"document.querySelector('{FORM} progress')?.value > 0")
    assert "left" in page.text(FORM)
    page.click("generate.stop")
    assert page.job_end(FORM, 10).startswith("Cancelled after")
    assert page.run(f"document.querySelector('{PICTURES}').src") == kept
    assert set(server.outputs.glob("*.png")) == before


def test_what_can_not_be_drawn_is_told_and_the_last_pictures_stay(page: PageDriver) -> None:
    draw(page, "a red circle")
    page.wait(f"document.querySelector('{PICTURES}')?.naturalWidth")
    page.type("generate.seed", str(2**40))
    page.click("generate.start")
    page.wait(f"document.querySelector('{FORM} .prefuse-refused')")
    assert "seed must be" in page.text(FORM)
    assert page.count(PICTURES)


def test_a_second_click_waits_and_says_so(page: PageDriver) -> None:
    page.slide("generate.steps", 150)
    page.click("generate.start")
    page.wait(f"document.querySelector('{FORM} progress')?.value > 0")
    page.click("generate.start")
    page.wait(f"/1 more of this form/.test(document.querySelector('{FORM}').textContent)", 10)
    page.click("generate.stop")
    assert page.job_end(FORM, 10).startswith("Cancelled after")


def test_a_model_is_loaded_when_it_is_chosen_and_one_that_can_not_be_is_told_and_the_former_stays(
    page: PageDriver, server: PageServer
) -> None:
    (server.models / "broken.safetensors").write_bytes(b"no tensors at all")
    (server.models / "twin").symlink_to(MODEL_DIR, target_is_directory=True)
    page.open()
    page.choose("generate.model", "twin")
    assert page.job_end(MODEL).startswith("Done")
    page.choose("generate.model", "broken")
    page.wait(f"document.querySelector('{MODEL} .prefuse-refused')")
    assert "broken.safetensors" in page.text(MODEL)
    page.wait(f"document.querySelector('{place('generate.model')} input').value === 'twin'", 10)
    assert draw(page, "a red circle").startswith("Done")
    page.choose("generate.model", "demo")
    page.wait(f"!document.querySelector('{MODEL} .prefuse-refused')")
    assert page.job_end(MODEL).startswith("Done")


def test_an_infotext_fills_the_controls_from_the_prompt_and_from_a_dropped_picture(
    page: PageDriver, tmp_path: Path
) -> None:
    page.type("generate.prompt", INFOTEXT)
    page.click("generate.read")
    page.wait(f"document.querySelector('{place('generate.seed')} input').value === '77'", 10)
    wanted = {"prompt": "a green square <lora:stripes:0.5>", "negative": "blue", "sampler": "DPM++ 2M Karras"}
    wanted |= {"steps": "3", "cfg": "4.5", "width": "72", "height": "80"}
    assert {name: page.value(f"generate.{name}") for name in wanted} == wanted
    page.type("generate.prompt", "no infotext")
    page.click("generate.read")
    page.wait("/no infotext/.test(document.querySelector('#prefuse-generate-status').textContent)", 10)
    drop_picture(page, tmp_path)
    page.wait(f"document.querySelector('{place('generate.seed')} input').value === '5'", 20)
    assert page.value("generate.prompt") == "from a file"


def drop_picture(page: PageDriver, folder: Path) -> None:
    """Let go of a PNG file over the prompt."""
    from PIL import Image

    from lib_lora.hosts.standalone.infotext import Infotext, png_bytes

    parameters = {"Steps": "2", "Sampler": "DDIM", "Seed": "5", "Size": "64x64"}
    data = base64.b64encode(png_bytes(Image.new("RGB", (8, 8)), Infotext("from a file", "", parameters))).decode()
    page.run(
        f"""(() => {{
            const data = Uint8Array.from(atob("{data}"), (one) => one.charCodeAt(0));
            const files = new DataTransfer();
            files.items.add(new File([data], "picture.png", {{type: "image/png"}}));
            const options = {{bubbles: true, cancelable: true, dataTransfer: files}};
            document.querySelector("{place("generate.prompt")} textarea").dispatchEvent(new DragEvent("drop", options));
        }})()"""
    )


def test_ctrl_enter_draws_and_arrow_keys_move_a_slider_and_its_number(page: PageDriver) -> None:
    slider = f"{place('generate.steps')} input[type=range]"
    page.slide("generate.steps", 3)
    page.run(f"document.querySelector('{slider}').focus()")
    page.browser.press("ArrowRight")
    page.wait(f"document.querySelector('{place('generate.steps')} input[type=number]').value === '4'", 5)
    page.run(f"document.querySelector('{place('generate.steps')} input[type=number]').focus()")
    page.browser.press("ArrowDown")
    page.browser.press("ArrowDown")
    page.wait(f"document.querySelector('{slider}').value === '2'", 5)
    page.type("generate.prompt", "a red circle")
    page.browser.press("Enter", CTRL)
    assert page.job_end(FORM).startswith("Done in")
    assert "Steps: 2," in page.text(f"{REPORT} code")
