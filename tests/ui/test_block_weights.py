"""The sub-tab of block weights, in a browser."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lib_lora.presets import WEIGHTS_FILE
from lib_lora.prompt.block_names import LISTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.ui.driver import PageDriver
    from tests.ui.serving import PageServer

FORM = "#prefuse-tab-blocks"
TAG = "#prefuse-blocks-tag code"
CURVE = "#prefuse-blocks-curve svg"
NOTE = "#prefuse-blocks-presets-note"
PICTURES = "#prefuse-blocks-gallery img"
LIST = "document.querySelector('#prefuse-blocks-list textarea')"
ROWS = "#prefuse-blocks-sliders .prefuse-block"


@pytest.fixture
def blocks(page: PageDriver, server: PageServer) -> Iterator[PageDriver]:
    """The sub-tab with a LoRA chosen; the preset file is as it was afterwards."""
    file = server.loras / WEIGHTS_FILE
    choose_lora(page)
    yield page
    file.unlink(missing_ok=True)


def choose_lora(page: PageDriver) -> None:
    page.sub_tab("Block weights")
    page.choose("blocks.lora", "outline")
    page.wait(f"document.querySelector('{TAG}')?.textContent.startsWith('<lora:outline:')")


def knob(block: str) -> str:
    return f"{ROWS} input[type=range][aria-label={block}]"


def drag(page: PageDriver, block: str, weights: list[float]) -> None:
    """Over some weights, one after the other, without a pause."""
    page.run(
        f"""for (const weight of {json.dumps(weights)}) {{
            const knob = document.querySelector("{knob(block)}");
            knob.value = weight;
            knob.dispatchEvent(new Event("input", {{bubbles: true}}));
        }}"""
    )


def tag_becomes(page: PageDriver, tag: str) -> None:
    page.wait(f"document.querySelector('{TAG}')?.textContent === {json.dumps(tag)}", 20)


def told(page: PageDriver, words: str) -> None:
    page.wait(f"document.querySelector('{NOTE}')?.textContent.includes({json.dumps(words)})", 20)


def test_a_lora_brings_its_blocks_and_a_drag_redraws_the_curve(blocks: PageDriver) -> None:
    assert blocks.count(ROWS) == 26
    assert blocks.count(f"{CURVE} title") == 26
    before = blocks.run(f"document.querySelector('{CURVE}').innerHTML")
    drag(blocks, "IN04", [0.9, 0.5, 0.25])
    tag_becomes(blocks, f"<lora:outline:1:lbw={','.join(['1'] * 5 + ['0.25'] + ['1'] * 20)}>")
    blocks.wait(f"document.querySelector('{CURVE}').innerHTML !== {json.dumps(before)}")
    assert blocks.value("blocks.list").split(",")[5] == "0.25"


def test_an_arrow_key_moves_a_slider(blocks: PageDriver) -> None:
    blocks.run(f"document.querySelector('{knob('M00')}').focus()")
    blocks.browser.press("ArrowLeft")
    blocks.wait(f"document.querySelector('{knob('M00')}').value === '0.95'")
    blocks.wait(f"{LIST}.value.split(',')[13] === '0.95'")


def test_a_typed_list_moves_the_sliders_and_letters_stay(blocks: PageDriver) -> None:
    blocks.type("blocks.list", ",".join(["0.5"] * 16 + ["R"]))
    blocks.wait(f"document.querySelectorAll('{ROWS}').length === 17")
    assert blocks.run(f"document.querySelector('{knob('IN01')}').value") == "0.5"
    blocks.wait(f"document.querySelector('{FORM}').textContent.includes('drawn from the picture')")
    drag(blocks, "IN01", [1])
    tag_becomes(blocks, f"<lora:outline:1:lbw={','.join(['0.5', '1'] + ['0.5'] * 14 + ['R'])}>")


def test_sliders_show_the_typed_list_in_its_order_and_write_a_typed_name_out(blocks: PageDriver) -> None:
    numbers = [f"{index / 20:g}" for index in range(26)]
    numbers[21:] = ["0"] * 5
    blocks.type("blocks.list", ",".join(numbers))
    blocks.wait(f"document.querySelector('{knob('M00')}').value === '0.65'")
    assert [blocks.run(f"document.querySelector('{knob(block)}').value") for block in LISTS[26]] == numbers
    blocks.type("blocks.list", "linear")
    blocks.wait(f"document.querySelector('{knob('M00')}').value === '0.5'")
    drag(blocks, "M00", [0.75])
    written = f"{LIST}.value.split(',')"
    blocks.wait(f"{written}.length === 26 && {written}[13] === '0.75'")
    assert blocks.value("blocks.list").startswith("1,0,0.0417,")


def test_a_list_that_can_not_be_read_is_refused_and_the_curve_stays(blocks: PageDriver) -> None:
    before = blocks.run(f"document.querySelector('{CURVE}').innerHTML")
    blocks.type("blocks.list", "1,2,3")
    blocks.wait(f"document.querySelector('{FORM}').textContent.includes('12, 17, 20 or 26')")
    assert blocks.run(f"document.querySelector('{CURVE}').innerHTML") == before


def test_a_curve_and_the_buttons_move_the_sliders(blocks: PageDriver) -> None:
    blocks.choose("blocks.preset", "linear")
    tag_becomes(blocks, "<lora:outline:1:lbw=linear>")
    assert blocks.run(f"document.querySelector('{knob('M00')}').value") == "0.5"
    blocks.click("blocks.invert")
    blocks.wait(f"document.querySelector('{knob('IN00')}').value === '1'")
    blocks.click("blocks.zeros")
    tag_becomes(blocks, "<lora:outline:1:lbw=NONE>")
    blocks.browser.click("#prefuse-blocks-wide input")
    blocks.wait(f"document.querySelector('{knob('M00')}').min === '-1'")


def test_what_was_moved_goes_back_where_the_sliders_were_before(blocks: PageDriver) -> None:
    drag(blocks, "M00", [0.5])
    tag_becomes(blocks, f"<lora:outline:1:lbw={','.join(['1'] * 13 + ['0.5'] + ['1'] * 12)}>")
    blocks.click("blocks.ones")
    tag_becomes(blocks, "<lora:outline:1>")
    blocks.wait(f"document.querySelector('{knob('M00')}').value === '1'")


def test_another_number_of_blocks_can_be_chosen(blocks: PageDriver) -> None:
    blocks.choose("blocks.length", "12 (SDXL, attention)")
    blocks.wait(f"document.querySelectorAll('{ROWS}').length === 12")
    assert "lies in blocks that a list of 12 does not have" in blocks.text(FORM)


def test_a_preset_is_saved_found_after_a_reload_renamed_and_deleted(blocks: PageDriver, server: PageServer) -> None:
    blocks.click("blocks.zeros")
    tag_becomes(blocks, "<lora:outline:1:lbw=NONE>")
    drag(blocks, "OUT05", [0.5])
    blocks.type("blocks.name", "middle out")
    blocks.click("blocks.save")
    told(blocks, "is saved")
    spelled = ",".join(["0"] * 19 + ["0.5"] + ["0"] * 6)
    assert (server.loras / WEIGHTS_FILE).read_text() == f"middle out:{spelled}\n"

    blocks.open()
    choose_lora(blocks)
    blocks.choose("blocks.preset", "middle out")
    tag_becomes(blocks, "<lora:outline:1:lbw=middle out>")

    blocks.type("blocks.name", "out five")
    blocks.click("blocks.rename")
    told(blocks, "is now")
    assert (server.loras / WEIGHTS_FILE).read_text().startswith("out five:")
    blocks.click("blocks.delete")
    blocks.wait("/out five/.test(document.querySelector('#prefuse-blocks-delete-sure')?.innerText)")
    assert (server.loras / WEIGHTS_FILE).read_text()
    blocks.click("blocks.delete_sure")
    told(blocks, "is deleted")
    assert (server.loras / WEIGHTS_FILE).read_text() == ""


def test_a_name_that_is_taken_is_refused_until_it_may_be_replaced(blocks: PageDriver, server: PageServer) -> None:
    blocks.type("blocks.name", "INS")
    blocks.click("blocks.save")
    told(blocks, "already")
    assert not (server.loras / WEIGHTS_FILE).exists()
    blocks.browser.click("#prefuse-blocks-replace input")
    blocks.click("blocks.save")
    told(blocks, "is saved")


def test_presets_are_imported_and_exported(blocks: PageDriver, server: PageServer, tmp_path: Path) -> None:
    file = tmp_path / "lbwpresets.txt"
    mine = ",".join(["0.25"] * 17)
    file.write_text(f"# mine\nFROM THERE:{mine}\nBAD:1,2\n", encoding="utf-8")
    blocks.browser.upload("input[type=file]:has(+ #prefuse-blocks-import)", file)
    told(blocks, "1 presets were added")
    assert "line 3" in blocks.text(NOTE)
    assert f"FROM THERE:{mine}\n" in (server.loras / WEIGHTS_FILE).read_text()
    blocks.click("blocks.export")
    blocks.wait("!!document.querySelector('a.prefuse-download')")
    assert blocks.value("blocks.exported") == f"FROM THERE:{mine}\n"
    text = blocks.run("fetch(document.querySelector('a.prefuse-download').href).then((answer) => answer.text())")
    assert text == f"FROM THERE:{mine}\n"


def test_the_tag_is_put_into_the_prompt_in_the_place_of_the_former(blocks: PageDriver) -> None:
    blocks.click("blocks.put")
    prompt = "document.querySelector('#prefuse-generate-prompt textarea').value"
    blocks.wait(f"{prompt} === '<lora:outline:1>'")
    blocks.click("blocks.zeros")
    tag_becomes(blocks, "<lora:outline:1:lbw=NONE>")
    blocks.click("blocks.put")
    blocks.wait(f"{prompt} === '<lora:outline:1:lbw=NONE>'")


def test_two_presets_are_drawn_side_by_side_from_one_seed(blocks: PageDriver) -> None:
    blocks.type("blocks.prompt", "a red circle")
    blocks.type("blocks.seed", "7")
    blocks.slide("blocks.steps", 2)
    blocks.click("blocks.start")
    assert blocks.job_end(FORM).startswith("Done in")
    blocks.wait(f"document.querySelectorAll('{PICTURES}').length >= 3")
    assert "seed 7" in blocks.text(FORM)
    assert "outline at 1" in blocks.text(f"{FORM} .prefuse-report")
