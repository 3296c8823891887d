"""The page itself, in a browser: cards, the prompt, the status line under the pictures."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import MISSING, Browser, find_browser

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.webui_real.server import WebUI

pytestmark = pytest.mark.skipif("WEBUI_ROOT" in os.environ and find_browser() is None, reason=MISSING)

PROMPT = "#txt2img_prompt textarea"
CARD = '#txt2img_lora_cards .card[data-name="a"]'
STATUS = "#prefuse_status_txt2img"
INFO = "#generation_info_txt2img textarea"
EVIL = '<img src=x onerror="window.hit=1" a'
"""A file's name: HTML parsers close such an element by themselves."""
ABSENT = '<img src=x onerror="window.hit=2" b'


class Page:
    """The WebUI's txt2img page."""

    def __init__(self, browser: Browser, webui: WebUI, theme: str) -> None:
        self.browser = browser
        browser.open(f"http://127.0.0.1:{webui.port}/?__theme={theme}")
        browser.wait(f"document.querySelector('{CARD}') && window.opts && Object.keys(opts).length")
        browser.wait("!!document.querySelector('#txt2img_generate')?.offsetParent")

    def tab(self, name: str) -> None:
        browser = self.browser
        browser.wait(
            f"""[...document.querySelectorAll("#txt2img_extra_tabs > .tab-nav > button")]
            .filter((one) => one.textContent.trim() === "{name}").map((one) => one.id = "tab_of_the_test_{name}")[0]"""
        )
        browser.click(f"#tab_of_the_test_{name}")

    @property
    def prompt(self) -> str:
        return self.value(PROMPT)

    def value(self, selector: str) -> str:
        return self.browser.run(f"document.querySelector({json.dumps(selector)}).value")

    def text(self, selector: str) -> str:
        return self.browser.run(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")

    def click_card(self) -> str:
        """The prompt after a click on a's card."""
        self.tab("Lora")
        before = self.prompt
        self.browser.click(CARD)
        self.browser.wait(f"document.querySelector('{PROMPT}').value !== {json.dumps(before)}", 5)
        return self.prompt

    def generate(self, prompt: str) -> str:
        """The status line after a generation."""
        browser = self.browser
        self.tab("Generation")
        for name, number in (("steps", 2), ("width", 64), ("height", 64)):
            browser.type(f"#txt2img_{name} input[type=number]", str(number))
        browser.type(PROMPT, prompt)
        before = self.value(INFO)
        browser.run(f"window.told = document.querySelector('{STATUS}')?.firstChild; 0")
        browser.click("#txt2img_generate")
        browser.wait(
            f"""(() => {{
                const picture = document.querySelector("#txt2img_gallery img");
                return document.querySelector("{INFO}").value !== {json.dumps(before)}
                    && !document.querySelector("#txt2img_results .progressDiv") && picture?.naturalWidth === 64;
            }})()"""
        )
        data = json.loads(self.value(INFO))
        assert data["prompt"] == prompt
        part = f"document.querySelector('{STATUS}')?.firstChild"
        wanted = data["extra_generation_params"].get("Prefuse")
        browser.wait(f"!!{part} && {part} !== window.told" if wanted else f"!{part}", 5)
        return self.text(STATUS)


@pytest.fixture
def open_page(webui: WebUI, browser: Browser) -> Callable[..., Page]:
    return lambda theme="light": Page(browser, webui, theme)


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()


def test_a_click_on_a_card_puts_its_tag_into_the_prompt_and_a_second_takes_it_out(page: Page) -> None:
    assert page.click_card().strip() == "<lora:a:1>"
    assert page.click_card() == ""


@pytest.mark.parametrize("tag", ["<lora:a:te=0.5:unet=-0.3>", "<lora:a:-0.5>", "<lora:a>", "<lyco:a:0.5:0.2>"])
def test_a_click_on_a_card_takes_out_a_tag_however_it_is_written_and_no_other(page: Page, tag: str) -> None:
    page.browser.type(PROMPT, f"a cube {tag}, red <lora:b:te=0.5>")
    assert page.click_card() == "a cube, red <lora:b:te=0.5>"
    assert page.click_card() == "a cube, red <lora:b:te=0.5> <lora:a:1>"


def test_the_editor_of_a_card_still_opens_and_the_prompt_stays(page: Page) -> None:
    page.tab("Lora")
    page.browser.click(f"{CARD} .edit-button", hover=CARD)
    page.browser.wait(
        """[...document.querySelectorAll(".global-popup .extra-network-name")]
        .some((one) => one.offsetParent && one.textContent.trim() === "a")""",
        15,
    )
    assert page.prompt == ""


def test_the_status_line_says_what_was_fused_and_in_how_many_milliseconds(page: Page) -> None:
    page.generate("a cube")
    assert page.text(STATUS) == ""
    status = page.generate("a cube <lora:a:te=0.5:unet=-0.3> <lora:b:0.4>")
    assert re.fullmatch(r"Prefuse: a te 0\.5, unet -0\.3 \+ b 0\.4 \(\d+ layers fused in [\d.]+ ms\)", status)
    status = page.generate("another cube <lora:a:te=0.5:unet=-0.3> <lora:b:0.4>")
    assert re.fullmatch(r"Prefuse: a te 0\.5, unet -0\.3 \+ b 0\.4 \(already fused, [\d.]+ ms\)", status)
    assert page.generate("a cube") == ""


def test_a_refusal_is_in_the_status_line_and_its_reason_under_the_picture(page: Page) -> None:
    status = page.generate("a cube <lora:a:0.5> <lora:nosuch:1>")
    assert status.startswith("Prefuse: a 0.5 (")
    assert status.endswith("; not applied: nosuch")
    comment = page.text("#html_log_txt2img .comments").strip()
    assert "nosuch" in comment
    assert page.browser.run(f"document.querySelector('{STATUS}').title") == comment


def test_everything_of_a_request_that_is_refused_is_in_the_status_line(page: Page) -> None:
    status = page.generate("a cube <lora:nosuch:1> <lora:cutshort:1>")
    assert status.startswith("Prefuse: no LoRA")
    assert status.endswith("; not applied: nosuch, cutshort")


def test_the_status_line_says_when_a_lora_acts(page: Page) -> None:
    status = page.generate("a cube <lora:a:0.8:start=1:stop=0.9> <lora:b:0.5>")
    assert status.startswith("Prefuse: a te 0, unet 0.8 [start=1:stop=0.9] + b 0.5 (")


def test_a_files_name_with_html_makes_no_element(page: Page, webui: WebUI) -> None:
    folder = webui.data / "models" / "Lora"
    file = folder / f"{EVIL}.safetensors"
    shutil.copyfile(folder / "c.safetensors", file)
    try:
        webui.post("/prefuse/v1/rescan")
        page.generate("a cube <lora:b:0.1> <lora:nosuch:1>")  # the places are there
        before = _elements(page.browser)
        status = page.generate(f"a cube <lora:{EVIL}:0.5> <lora:{ABSENT}:1>")
        assert status.startswith(f"Prefuse: {EVIL} 0.5 (")
        assert status.endswith(f"; not applied: {ABSENT}")
        assert ABSENT in page.text("#html_log_txt2img .comments")
        assert _elements(page.browser) == before
        assert page.browser.run("window.hit") is None
    finally:
        file.unlink()
        webui.post("/prefuse/v1/rescan")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_status_line_is_readable_small_and_below_everything_else(
    open_page: Callable[..., Page], theme: str
) -> None:
    page = open_page(theme)
    page.generate("a cube <lora:a:0.5> <lora:nosuch:1>")
    for part in (".prefuse-applied", ".prefuse-refused"):
        color, background = page.browser.run(
            f"""(() => {{
                let place = document.querySelector("{STATUS} {part}");
                const color = getComputedStyle(place).color;
                const ground = (one) => getComputedStyle(one).backgroundColor;
                while (place.parentElement && ground(place) === "rgba(0, 0, 0, 0)") place = place.parentElement;
                return [color, ground(place)];
            }})()"""
        )
        assert _contrast(color, background) >= 4.5, (part, color, background)
    line, log = page.browser.box(STATUS), page.browser.box("#html_log_txt2img")
    results = page.browser.box("#txt2img_results")
    assert line["y"] >= log["y"] + log["height"]
    assert line["height"] <= 40
    assert line["x"] >= results["x"]
    assert line["x"] + line["width"] <= results["x"] + results["width"]


def test_no_script_of_ours_throws(page: Page) -> None:
    page.click_card()
    page.generate("a cube <lora:a:te=0.5>")
    assert not [error for error in page.browser.errors if "prefuse" in error]


def _elements(browser: Browser) -> dict[str, Any]:
    """How many of those there are that a name could make."""
    return browser.run(
        """Object.fromEntries(["[onerror]", "img[src=x]", "script", "#txt2img_results *"]
        .map((selector) => [selector, document.querySelectorAll(selector).length]))"""
    )


def _contrast(one: str, other: str) -> float:
    """Of two CSS colours, as the Web Content Accessibility Guidelines compute it."""

    def luminance(color: str) -> float:
        channels = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
