"""Where in a LoRA its change lies: blocks along, elements down, the more colour the larger the share."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from lib_lora.tools.plots.style import (
    BAR_COLOUR,
    GRID_ALPHA,
    INK,
    SMALL,
    WIDTH,
    Edges,
    Plot,
    add_axes,
    fit,
    name_blocks,
    new_plot,
    percent,
    width_of,
    write,
)
from lib_lora.tools.plots.words import ENGLISH, Words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROW = 17.0
"""Height in pixels."""
WIDEST_NAME = 130.0
FAINTEST = 0.08
"""Of what is there at all."""
TOP, BOTTOM, RIGHT = 32.0, 52.0, 44.0


def draw_heat(
    shares: Mapping[tuple[str, str], float],
    blocks: Sequence[str],
    elements: Sequence[str],
    width: float = WIDTH,
    words: Words = ENGLISH,
) -> Plot:
    """A field for each block's element, its colour as strong as the root of its share.

    Args:
        shares: (block, element) → part of the whole change; what is not there has none.
        blocks: The columns, at least one.
        elements: The rows, at least one.
        width: In pixels.
        words: Texts of the plot.

    Raises:
        JobError: If matplotlib is not installed.
    """
    left = 10 + min(WIDEST_NAME, max(width_of(element, SMALL) for element in elements))
    most = max(shares.values(), default=0.0)
    title = words.heat.format(most=f"{100 * most:.2g}%")
    plot = new_plot(title, width, TOP + BOTTOM + ROW * len(elements))
    edges = Edges(left, RIGHT, TOP, BOTTOM)
    axes = add_axes(plot, edges, title, grid="")
    axes.set_ylim(len(elements) - 0.5, -0.5)
    axes.set_yticks(range(len(elements)), [fit(element, SMALL, WIDEST_NAME) for element in elements])
    name_blocks(axes, blocks, (width - left - RIGHT) / len(blocks))
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    _draw_fields(axes, shares, blocks, elements)
    _write_sums(axes, shares, elements, width - left - RIGHT)
    return plot


def _draw_fields(
    axes: Any, shares: Mapping[tuple[str, str], float], blocks: Sequence[str], elements: Sequence[str]
) -> None:
    from matplotlib.patches import Rectangle

    most = max(shares.values(), default=0.0) or 1.0
    frame = Rectangle((-0.5, -0.5), len(blocks), len(elements), fill=False, edgecolor=INK, alpha=2 * GRID_ALPHA)
    axes.add_patch(frame)
    for (block, element), share in shares.items():
        strength = max(FAINTEST, math.sqrt(share / most))
        place = (blocks.index(block) - 0.47, elements.index(element) - 0.45)
        field = Rectangle(place, 0.94, 0.9, facecolor=BAR_COLOUR, alpha=strength, linewidth=0)
        field.set_gid(f"{block} {element}: {share:.2%}")
        axes.add_patch(field)


def _write_sums(axes: Any, shares: Mapping[tuple[str, str], float], elements: Sequence[str], right: float) -> None:
    """The share of each row."""
    sums: defaultdict[str, float] = defaultdict(float)
    for (_, element), share in shares.items():
        sums[element] += share
    for row, element in enumerate(elements):
        y = ROW * (len(elements) - row - 0.5)
        write(axes, right + 5, y, percent(sums[element]), va="center_baseline")
