"""Sliders of block weights as HTML, one row for each block, grouped; the page's script writes what they say."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.prompt.block_names import ENCODERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lib_lora.tools.block_lists import BlockList
    from lib_lora.ui.texts import Texts

STEP = 0.05
"""Of a slider, and of an arrow key."""
_GROUPS = {"BASE": "BASE", "M": "MID", "IN": "IN", "D": "DOUBLE", "S": "SINGLE", "OUT": "OUT"}
"""Blocks, by their names without numbers, and what is over them; those that have few come first."""


class SliderRange(NamedTuple):
    """How many sliders there are, and from where to where they go.

    Attributes:
        blocks: As many sliders.
        lowest: At the left end.
        highest: At the right end.
    """

    blocks: int
    lowest: float = 0.0
    highest: float = 1.0

    @classmethod
    def of(cls, weights: Sequence[float], lowest: float, highest: float) -> SliderRange:
        """A range that goes as far as given, or as the weights do."""
        return cls(len(weights), min(lowest, *map(math.floor, weights)), max(highest, *map(math.ceil, weights)))

    def holds(self, other: SliderRange) -> bool:
        """Whether what `other` shows can be shown here."""
        return self.blocks == other.blocks and self.lowest <= other.lowest and other.highest <= self.highest


def sliders(texts: Texts, blocks: BlockList, ends: SliderRange, serial: int) -> str:
    """A row for each block.

    Args:
        texts: Words of the page.
        blocks: With their weights.
        ends: Of the sliders.
        serial: Another number each time: what was moved since must go back even where the rows are the same again.
    """
    groups: dict[str, list[str]] = {name: [] for name in _GROUPS.values()}
    for index, (block, weight) in enumerate(zip(blocks.items, blocks.weights, strict=True)):
        groups[_group(block)].append(_row(texts, index, block, weight, ends))
    fields = "".join(_field(name, rows) for name, rows in groups.items() if rows)
    return f'<div class="prefuse-sliders" data-prefuse-serial="{serial}">{fields}</div>'


def _group(block: str) -> str:
    return "BASE" if block in ENCODERS else _GROUPS[block.rstrip("0123456789")]


def _field(name: str, rows: Sequence[str]) -> str:
    return f'<fieldset class="prefuse-sliders-{name.lower()}"><legend>{name}</legend>{"".join(rows)}</fieldset>'


def _row(texts: Texts, index: int, block: str, weight: float, ends: SliderRange) -> str:
    hint = escape(texts("blocks.slider.hint", block=block), quote=True)
    common = f'data-prefuse-item="{index}" value="{weight:g}" aria-label="{block}" autocomplete="off"'
    knob = f'<input type="range" min="{ends.lowest:g}" max="{ends.highest:g}" step="{STEP}" {common}>'
    number = f'<input type="number" step="{STEP}" {common}>'
    return f'<div class="prefuse-block" title="{hint}"><span>{block}</span>{knob}{number}</div>'
