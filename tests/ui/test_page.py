"""What all sub-tabs share: tooltips, the clipboard, widths, no other computer, hostile names."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from lib_lora.core.files import read_lora_file
from lib_lora.core.saving import save_tensors
from lib_lora.ui.texts import Texts
from tests.hostile import HOSTILE_TEXTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.ui.driver import PageDriver
    from tests.ui.serving import PageServer

pytest.importorskip("gradio", reason="a test of the page did not run: no gradio")

TITLES = {key: Texts()(f"tab.{key}") for key in ("generate", "blocks", "analyse", "workshop", "inspect")}
WIDTHS = (1280, 390)
SHOWN = ".filter((one) => one.offsetParent && one.id in hints)"
TOOLTIPS = f"""(() => {{
    const hints = JSON.parse(document.getElementById("prefuse-hints").dataset.hints);
    const controls = [...document.querySelectorAll("#prefuse [id^=prefuse-]")]{SHOWN};
    for (const one of controls) {{
        const part = one.querySelector("input, textarea, button") || one;
        part.dispatchEvent(new PointerEvent("pointerover", {{bubbles: true}}));
    }}
    return [controls.length, controls.filter((one) => one.title !== hints[one.id]).map((one) => one.id)];
}})()"""
HARMFUL = (
    "[onerror], [onload], [onmouseover], [src=x], #prefuse iframe:not([src='about:blank']), "
    "#prefuse object, #prefuse embed, #prefuse marquee"
)
LETTERS = 100
"""Of a text, in a file's name."""
FIELDS = ("ss_output_name", "ss_base_model_version", "ss_sd_model_name", "modelspec.title", "ss_network_module")
GRADIO_3_ASKS = {"cdnjs.cloudflare.com", "fonts.googleapis.com", "fonts.gstatic.com"}


@pytest.mark.parametrize("tab", TITLES)
def test_every_control_that_is_shown_has_its_tooltip(page: PageDriver, tab: str) -> None:
    page.sub_tab(TITLES[tab])
    page.wait(f"document.getElementById('prefuse-tab-{tab}')?.offsetParent")
    count, without = page.wait(f"((found) => found[0] && found)({TOOLTIPS})", 10)
    assert count >= 3
    assert not without


@pytest.mark.parametrize("width", WIDTHS)
def test_every_sub_tab_fits_the_window(page: PageDriver, width: int) -> None:
    page.open(width=width)
    for tab, title in TITLES.items():
        page.sub_tab(title)
        page.wait(f"document.getElementById('prefuse-tab-{tab}')?.offsetParent")
        assert page.run("document.documentElement.scrollWidth") <= width, tab


def test_on_a_phone_the_prompt_is_on_top_and_the_button_below_it_without_scrolling(page: PageDriver) -> None:
    page.open(width=390, height=800)
    prompt, button = (page.browser.box(f"#prefuse-generate-{name}") for name in ("prompt", "start"))
    assert prompt["y"] < button["y"] < 800 - button["height"]


def test_the_page_asks_no_other_computer_for_anything(page: PageDriver) -> None:
    from lib_lora.ui.versions import MODERN

    for title in TITLES.values():
        page.sub_tab(title)
    page.wait("document.readyState === 'complete'")
    asked = {urlsplit(url).hostname for url in page.browser.requests if url.startswith(("http", "ws"))}
    assert "127.0.0.1" in asked
    assert asked - {"127.0.0.1"} <= (set() if MODERN else GRADIO_3_ASKS)


def test_a_text_is_copied_where_the_browser_gives_scripts_no_clipboard(page: PageDriver) -> None:
    page.run("Object.defineProperty(navigator, 'clipboard', {value: undefined}), 0")
    page.run("document.addEventListener('copy', (event) => { window.copied = event.target.value; }), 0")
    page.run(
        """(() => {
            const button = document.createElement("button");
            button.className = "prefuse-copy";
            button.dataset.text = "<lora:a:1>\\nSteps: 2";
            button.id = "button-of-the-test";
            button.textContent = "copy";
            document.getElementById("prefuse").prepend(button);
        })()"""
    )
    page.browser.click("#button-of-the-test")
    assert page.wait("window.copied") == "<lora:a:1>\nSteps: 2"
    assert page.count(".prefuse-copied") == 1


@pytest.fixture(scope="module")
def hostile(server: PageServer) -> Iterator[None]:
    """LoRA files whose names and metadata would be elements of a page that does not escape them."""
    folder = server.loras / "hostile"
    folder.mkdir()
    tensors = read_lora_file(server.loras / "stripes.safetensors").tensors
    for number, text in enumerate(HOSTILE_TEXTS):
        name = "".join(sign if sign.isprintable() and sign != "/" else "\\" for sign in text[:LETTERS])
        metadata = dict.fromkeys(FIELDS, text) | {"ss_tag_frequency": json.dumps({text: {text: 1}}), text[:40]: text}
        save_tensors(folder / f"{name}{number}.safetensors", tensors, metadata)
    yield
    shutil.rmtree(folder)


@pytest.mark.parametrize("tab", TITLES)
def test_forty_hostile_names_make_no_element_in_any_list(page: PageDriver, hostile: None, tab: str) -> None:
    harmful = page.count(HARMFUL)
    page.sub_tab(TITLES[tab])
    page.wait(f"document.getElementById('prefuse-tab-{tab}')?.offsetParent")
    fields = f"[...document.querySelectorAll('#prefuse-tab-{tab} input')].filter((one) => one.offsetParent)"
    for number in range(page.run(f"{fields}.length")):
        page.run(f"{fields}[{number}]?.focus()")  # opens it, if it is a list
    assert page.count(HARMFUL) == harmful
    assert page.run("[window.hacked, window.hit]") == [None, None]


def test_forty_hostile_names_are_text_in_the_completion_and_in_the_report(page: PageDriver, hostile: None) -> None:
    harmful = page.count(HARMFUL)
    page.type("generate.prompt", "<lora:")
    page.wait("document.querySelectorAll('#prefuse-completion .prefuse-word').length")
    assert len({*page.texts("#prefuse-completion .prefuse-word-note")} & {*HOSTILE_TEXTS}) > 10
    tags = page.run("JSON.parse(document.querySelector('#prefuse-words [data-words]').dataset.words).loras")
    asked = [tag for tag, alias, _ in tags if alias in HOSTILE_TEXTS]
    page.type("generate.prompt", "".join(f"<lora:{tag}:0.01><lora:no such {tag}:1>" for tag in asked))
    page.slide("generate.steps", 1)
    page.job("generate.start", "#prefuse-generate-status")
    assert page.count("#prefuse-generate-report li") >= len(HOSTILE_TEXTS)
    assert page.count(HARMFUL) == harmful
    assert page.run("[window.hacked, window.hit]") == [None, None]
