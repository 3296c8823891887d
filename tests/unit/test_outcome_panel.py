"""What the page shows of a job's outcome: the facts, cut where they are long, and never more than text."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lib_lora.core.saving import DiskSpace
from lib_lora.tools.outcome import LayerOutcome, LoraOutcome
from lib_lora.ui.outcome import MOST_ROWS, outcome_panel
from lib_lora.ui.texts import Texts

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></tr></table><h1>",
    "\"' onmouseover='alert(1)",
    "&lt;b&gt;",
    "${alert(1)} {{constructor}} {count}",
    "\u202egnp.exe",
)


class Seen(HTMLParser):
    """Elements and the visible text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def outcome(*, name: str = "plain", layers: int = 3, written: bool = True, at_most: bool = False) -> LoraOutcome:
    made = [LayerOutcome(f"{name}{number}", 8, number + 1, 2.0, 0.01 * number) for number in range(layers)]
    return LoraOutcome(
        paths=(Path("folder") / "made.safetensors",),
        size=12_345_678,
        disk=DiskSpace(23_456_789, 9_876_543_210),
        metadata={name: f"{name} is its text"},
        notes=(f"note of {name}",),
        written=written,
        at_most=at_most,
        base_model=f"family {name}",
        dtype="float16",
        layers=tuple(made),
    )


def test_size_place_room_ranks_and_metadata_are_told() -> None:
    text = Seen(outcome_panel(Texts("en"), outcome())).text
    for told in ("Written", str(Path("folder") / "made.safetensors"), "12.35 MB", "23.5 MB needed, 9,876.5 MB free"):
        assert told in text
    assert "1 (1 layers), 2 (1 layers), 3 (1 layers)" in text
    assert "Metadata (1)" in text
    assert "plain is its text" in text
    assert "note of plain" in text


def test_a_preview_says_that_nothing_was_written_and_knows_no_errors() -> None:
    text = Seen(outcome_panel(Texts("en"), outcome(written=False, at_most=True))).text
    assert "nothing was written" in text
    assert "at most 12.35 MB" in text
    assert "Error" not in text


def test_long_lists_are_cut_and_say_how_much_is_left() -> None:
    text = Seen(outcome_panel(Texts("en"), outcome(layers=MOST_ROWS + 30))).text
    assert text.count("… and 30 more") == 2, "ranks and layers"
    assert f"plain{MOST_ROWS + 29}" in text, "the layer with the largest error is shown"
    assert "plain0" not in text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_and_texts_of_files_never_become_elements(hostile: str) -> None:
    plain = Seen(outcome_panel(Texts("en"), outcome()))
    seen = Seen(outcome_panel(Texts("en"), outcome(name=hostile)))
    assert (seen.elements, seen.attributes) == (plain.elements, plain.attributes)
    assert f"{hostile} is its text" in seen.text


def test_chinese_has_words_for_all_of_it() -> None:
    text = Seen(outcome_panel(Texts("zh"), outcome(written=False))).text
    assert "没有写出任何东西" in text
    assert "Size" not in text
