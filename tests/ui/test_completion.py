"""What can follow in a LoRA tag is offered below the prompt."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.ui.driver import place

if TYPE_CHECKING:
    from tests.ui.driver import PageDriver
    from tests.ui.serving import PageServer

BOX = f"{place('generate.prompt')} textarea"
LORAS = {"cut short", "outline", "soft lines (v2)", "stripes"}
WORDS = "#prefuse-completion .prefuse-word"


@pytest.fixture
def prompt(page: PageDriver) -> PageDriver:
    """The page, whose prompt knows the LoRAs."""
    page.type("generate.prompt", "")
    page.wait("document.querySelector('#prefuse-words [data-words]')")
    return page


def offered(page: PageDriver, text: str) -> list[str]:
    """What is offered when `text` has been written."""
    page.type("generate.prompt", "")
    page.browser.write(text)
    return page.texts(WORDS)


def test_the_first_page_holds_no_lora_and_the_prompt_asks_for_them(page: PageDriver) -> None:
    assert not page.count("[data-words]")
    page.type("generate.prompt", "a circle <lora:")
    page.wait(f"document.querySelectorAll('{WORDS}').length")
    assert set(page.texts(WORDS)) >= LORAS


def test_names_are_found_by_their_beginning_a_part_and_an_alias(prompt: PageDriver) -> None:
    assert set(offered(prompt, "a circle <lora:")) >= LORAS
    assert offered(prompt, "a circle <lora:STR") == ["stripes"]
    assert offered(prompt, "a circle <lyco:line") == ["outline", "soft lines (v2)"]
    assert offered(prompt, "a circle <lora:softly") == ["soft lines (v2)"]
    assert offered(prompt, "a circle <lora:nosuch") == []
    assert offered(prompt, "a circle, lora:s") == []
    assert offered(prompt, "a circle <lora:stripes:1> s") == []


def test_the_keyboard_takes_a_name_an_argument_and_a_preset(prompt: PageDriver) -> None:
    assert offered(prompt, "a <lora:stri") == ["stripes"]
    prompt.browser.press("Enter")
    assert prompt.value("generate.prompt") == "a <lora:stripes:1>"
    prompt.browser.write(":")
    assert prompt.texts(WORDS)[:4] == ["te=", "unet=", "dyn=", "lbw="]
    prompt.browser.write("lb")
    prompt.browser.press("Tab")
    assert prompt.value("generate.prompt") == "a <lora:stripes:1:lbw=>"
    prompt.browser.write("mid")
    assert prompt.texts(WORDS)[0] == "MIDD"
    prompt.browser.press("Tab")
    assert prompt.value("generate.prompt") == "a <lora:stripes:1:lbw=MIDD>"
    assert not prompt.count(WORDS)
    assert prompt.run("document.activeElement.matches('textarea')"), "Tab did not leave the prompt"


def test_the_arrows_go_round(prompt: PageDriver) -> None:
    assert len(offered(prompt, "<lora:stripes:1:hr")) == 3
    chosen = "document.querySelector('#prefuse-completion [aria-selected=true] .prefuse-word').textContent"
    assert prompt.run(chosen) == "hr="
    seen = []
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp"):
        prompt.browser.press(key)
        seen.append(prompt.run(chosen))
    assert seen == ["hrte=", "hrunet=", "hr=", "hrunet="]


def test_escape_closes_the_list_and_the_mouse_takes_from_it(prompt: PageDriver) -> None:
    assert offered(prompt, "<lora:str")
    prompt.browser.press("Escape")
    assert not prompt.count(WORDS)
    offered(prompt, "<lora:out")
    prompt.browser.click("#prefuse-completion [role=option]")
    assert prompt.value("generate.prompt") == "<lora:outline:1>"


def test_in_a_tag_that_is_written_out_only_the_name_changes(prompt: PageDriver) -> None:
    prompt.type("generate.prompt", "<lora:stripes:0.5:dyn=4> end")
    prompt.run(f"document.querySelector('{BOX}').setSelectionRange(6, 13)")
    prompt.browser.write("outl")
    prompt.browser.press("Tab")
    assert prompt.value("generate.prompt") == "<lora:outline:0.5:dyn=4> end"


def test_a_new_file_is_offered_when_the_prompt_gets_the_focus_again(prompt: PageDriver, server: PageServer) -> None:
    new = server.loras / "brand new.safetensors"
    shutil.copyfile(server.loras / "stripes.safetensors", new)
    try:
        prompt.browser.click(f"{place('generate.negative')} textarea")
        prompt.type("generate.prompt", "<lora:bran")
        prompt.wait(f"document.querySelectorAll('{WORDS}').length", 10)
        assert prompt.texts(WORDS) == ["brand new"]
    finally:
        new.unlink()


def test_two_thousand_names_are_searched_within_a_frame_or_two(prompt: PageDriver) -> None:
    names = [[f"style number {number:04}", f"<b>{number}</b>", 1] for number in range(2000)]
    data = json.dumps({"loras": names, "arguments": [], "lbw": [], "lbwe": []})
    prompt.run(
        f"""(() => {{
            const one = document.createElement("div");
            one.dataset.words = {json.dumps(data)};
            document.querySelector("#prefuse-words [data-words]").replaceWith(one);
        }})()"""
    )
    prompt.type("generate.prompt", "<lora:numb")
    times = prompt.run(
        f"""(() => {{
            const box = document.querySelector("{BOX}");
            return [..."er 19"].map((letter) => {{
                const start = performance.now();
                document.execCommand("insertText", false, letter);
                document.body.offsetHeight;
                return performance.now() - start;
            }});
        }})()"""
    )
    assert sorted(times)[len(times) // 2] < 50
    found = prompt.texts(WORDS)
    assert found[0] == "style number 1900"
    assert len(found) == 40
    assert not prompt.count("#prefuse-completion b")


def test_nothing_is_offered_in_a_box_that_is_not_for_prompts(prompt: PageDriver) -> None:
    prompt.type("generate.negative", "<lora:str")
    assert not prompt.count(WORDS)
