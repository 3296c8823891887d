"""Numbers as bars: how often tags occur in the training, and how much each block changes a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.tools.plots.style import (
    BAR_COLOUR,
    INK,
    SMALL,
    WIDTH,
    Edges,
    Plot,
    add_axes,
    add_bars,
    fit,
    new_plot,
    width_of,
)
from lib_lora.tools.plots.words import ENGLISH, Words

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_TAGS = 30
ROW = 19.0
"""Height of a tag's bar with its gap, in pixels."""
WIDEST_TAG = 210.0
TOP = 34.0
CHANGES_HEIGHT = 230
CHANGES_EDGES = Edges(left=46, top=32, bottom=52)


def draw_tags(counts: Mapping[str, int], width: float = WIDTH, words: Words = ENGLISH) -> Plot:
    """The tags that occur most, the most first.

    Args:
        counts: Tag → how often, at least one.
        width: In pixels.
        words: Texts of the plot.

    Raises:
        JobError: If matplotlib is not installed.
    """
    top = sorted(counts.items(), key=lambda item: -item[1])[:MOST_TAGS]
    names = [fit(tag, SMALL, WIDEST_TAG) for tag, _ in top]
    left = 10 + max(width_of(name, SMALL) for name in names)
    right = 12 + max(width_of(f"{count}", SMALL) for _, count in top)
    title = words.tags.format(shown=len(top), all=len(counts))
    plot = new_plot(title, width, TOP + 10 + ROW * len(top))
    axes = add_axes(plot, Edges(left, right, TOP, 10), title, grid="")
    bars = axes.barh(range(len(top)), [count for _, count in top], 0.7, color=BAR_COLOUR, linewidth=0)
    for bar, (tag, count) in zip(bars, top, strict=True):
        bar.set_gid(f"{tag}: {count}")
    axes.bar_label(bars, [f"{count}" for _, count in top], fontsize=SMALL, color=INK, padding=4)
    axes.set_yticks(range(len(top)), names)
    axes.set_ylim(len(top) - 0.5, -0.5)
    axes.set_xlim(0, max(1, top[0][1]))
    axes.set_xticks([])
    return plot


def draw_changes(changes: Mapping[str, float], title: str, width: float = WIDTH) -> Plot:
    """How much each block changes a picture.

    Args:
        changes: Block → number, in the order of the bars; at least one, none negative.
        title: What the numbers are.
        width: In pixels.

    Raises:
        JobError: If matplotlib is not installed.
    """
    plot = new_plot(title, width, CHANGES_HEIGHT)
    axes = add_axes(plot, CHANGES_EDGES, title)
    pitch = (width - CHANGES_EDGES.left - CHANGES_EDGES.right) / len(changes)
    add_bars(axes, list(changes), list(changes.values()), [f"{change:.3g}" for change in changes.values()], pitch)
    return plot
