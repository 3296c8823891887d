"""The sub-tab that shows where a LoRA's change lies, in a browser."""

from __future__ import annotations

import csv
from io import StringIO
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ui.driver import PageDriver
    from tests.ui.serving import PageServer

FORM = "#prefuse-tab-analyse"
FIELDS = "#prefuse-analyse-heat svg path"
PICTURES = "#prefuse-analyse-pictures img"
BLOCKS = "#prefuse-analyse-blocks"


def width_of(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width


def open_lora(page: PageDriver, name: str) -> None:
    page.sub_tab("Analyse")
    page.choose("analyse.lora", name)
    page.wait(f"document.querySelectorAll('{BLOCKS} label').length")  # what is below has its place from now on


def tick(page: PageDriver, block: str) -> None:
    box = f"[...document.querySelectorAll('{BLOCKS} label')].find((one) => one.textContent.trim() === '{block}')"
    page.wait(f"!!{box}")
    page.run(f"{box}.click()")


def test_a_chosen_lora_is_shown_and_saved_as_table_and_plot(page: PageDriver, server: PageServer) -> None:
    open_lora(page, "stripes")
    assert page.wait(f"document.querySelectorAll('{FIELDS}').length") > 100
    assert len(page.texts(f"{BLOCKS} label")) == 17
    page.click("analyse.export")
    page.wait(f"document.querySelector('{FORM}').textContent.includes('Saved:')")
    rows = list(csv.DictReader(StringIO((server.outputs / "shares-stripes-1.csv").read_text("utf-8-sig"))))
    assert abs(sum(float(row["share"]) for row in rows) - 1) < 1e-4
    assert width_of(server.outputs / "shares-stripes-1.png") > 1000
    page.wait("document.querySelector('#prefuse-analyse-files')?.textContent.includes('shares-stripes-1')")


def test_pictures_appear_one_by_one_and_end_as_a_sheet(page: PageDriver, server: PageServer) -> None:
    open_lora(page, "stripes")
    for block in ("IN01", "OUT08"):
        tick(page, block)
    page.type("analyse.prompt", "a red circle")
    page.slide("analyse.steps", 2)
    page.click("analyse.start")
    page.wait(f"document.querySelectorAll('{PICTURES}').length === 7", 120)
    captions = page.texts("#prefuse-analyse-pictures figcaption")
    assert [one.partition(" ·")[0] for one in captions] == ["without the LoRA", "whole LoRA", "IN01", "OUT08"]
    assert page.run(f"[...document.querySelectorAll('{PICTURES}')].every((one) => one.naturalWidth === 64)")
    page.wait("document.querySelector('#prefuse-analyse-sheet')?.textContent.includes('blocks-stripes-1')")
    rows = list(csv.DictReader(StringIO((server.outputs / "blocks-stripes-1.csv").read_text("utf-8-sig"))))
    assert [row["block"] for row in rows] == ["whole", "IN01", "OUT08"]
    assert all(float(row["rms"]) > 0 for row in rows)
    assert width_of(server.outputs / "blocks-stripes-1.png") > 500


def test_drawing_can_be_cancelled_and_keeps_nothing(page: PageDriver, server: PageServer) -> None:
    open_lora(page, "outline")
    for block in page.texts(f"{BLOCKS} label"):
        tick(page, block)
    page.slide("analyse.steps", 50)
    page.click("analyse.start")
    page.wait(f"document.querySelectorAll('{PICTURES}').length", 120)
    page.click("analyse.interrupt")
    page.wait(f"document.querySelector('{FORM}').textContent.includes('Cancelled after')")
    assert not list(server.outputs.glob("*outline*"))


def test_without_a_lora_and_with_a_broken_one_a_sentence_is_shown(page: PageDriver) -> None:
    page.sub_tab("Analyse")
    page.click("analyse.start")
    page.wait(f"document.querySelector('{FORM}').textContent.includes('Choose a LoRA first.')")
    page.choose("analyse.lora", "cut short")
    page.wait(f"document.querySelector('{FORM} .prefuse-job')?.textContent.includes('cut short')")
