"""Weight per block over the LoRA's share per block, redrawn while a slider moves."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lib_lora.tools.plots.style import (
    INK,
    LETTERS,
    SMALL,
    WIDTH,
    Edges,
    Plot,
    add_axes,
    colour_of,
    name_blocks,
    new_plot,
    percent,
    write,
)
from lib_lora.tools.plots.words import ENGLISH, Words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEIGHT = 250
EDGES = Edges(left=42, right=46, top=30, bottom=46)
LIMIT_STEP = 0.5
"""The axis ends at multiples of this, so that it seldom moves with the weights."""
MOST_TICKS = 6
HEADROOM = 0.04
"""Of the axis, beyond its ends: the line is not cut there."""
KEPT_BACKGROUNDS = 32


class _Scene(NamedTuple):
    """All but the line.

    Attributes:
        blocks: In the order of a list of block weights.
        shares: As many, or none.
        limits: Of the weights' axis.
        width: In pixels.
        words: Texts.
    """

    blocks: tuple[str, ...]
    shares: tuple[float, ...]
    limits: tuple[float, float]
    width: float
    words: Words


class _Background(NamedTuple):
    """A scene that was drawn; `transform` leads from block number and weight to pixels."""

    elements: tuple[str, ...]
    transform: Any


def draw_weights(
    blocks: Sequence[str],
    weights: Sequence[float],
    shares: Mapping[str, float] | None = None,
    width: float = WIDTH,
    words: Words = ENGLISH,
) -> Plot:
    """A line of weights over bars of shares.

    Args:
        blocks: In the order of a list of block weights.
        weights: As many, finite.
        shares: Block → part of the LoRA's whole change; None to draw the line alone.
        width: In pixels.
        words: Texts of the plot.

    Raises:
        JobError: If matplotlib is not installed.
    """
    plot, axes = _draw(_scene(blocks, weights, shares, width, words))
    axes.add_line(_line(weights))
    return plot


def weights_svg(
    blocks: Sequence[str],
    weights: Sequence[float],
    shares: Mapping[str, float] | None = None,
    width: float = WIDTH,
    words: Words = ENGLISH,
) -> str:
    """`draw_weights` as SVG, in a millisecond: what is under the line is drawn once and kept.

    Raises:
        JobError: If matplotlib is not installed.
    """
    background = _background(scene := _scene(blocks, weights, shares, width, words))

    from lib_lora.tools.plots.renderers import SvgRenderer

    renderer = SvgRenderer(scene.width, HEIGHT)
    renderer.elements += background.elements
    _line(weights, transform=background.transform).draw(renderer)
    return renderer.document(words.weights)


def _scene(
    blocks: Sequence[str], weights: Sequence[float], shares: Mapping[str, float] | None, width: float, words: Words
) -> _Scene:
    lowest, highest = (
        round_to(end / LIMIT_STEP) * LIMIT_STEP
        for round_to, end in ((math.floor, min(0.0, *weights)), (math.ceil, max(1.0, *weights)))
    )
    heights = () if shares is None else tuple(shares.get(block, 0.0) for block in blocks)
    return _Scene(tuple(blocks), heights, (lowest, highest), width, words)


@lru_cache(KEPT_BACKGROUNDS)
def _background(scene: _Scene) -> _Background:
    from lib_lora.tools.plots.renderers import SvgRenderer

    plot, axes = _draw(scene)
    renderer = SvgRenderer(scene.width, HEIGHT)
    plot.figure.draw(renderer)
    return _Background(tuple(renderer.elements), axes.transData.frozen())


def _draw(scene: _Scene) -> tuple[Plot, Any]:
    plot = new_plot(scene.words.weights, scene.width, HEIGHT)
    axes = add_axes(plot, EDGES)
    lowest, highest = scene.limits
    beyond = HEADROOM * (highest - lowest)
    axes.set_ylim(lowest - beyond, highest + beyond)
    steps = round((highest - lowest) / LIMIT_STEP)
    every = LIMIT_STEP * max(1, math.ceil(steps / MOST_TICKS))
    ticks = [lowest + every * index for index in range(math.floor((highest - lowest) / every) + 1)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    name_blocks(axes, scene.blocks, (scene.width - EDGES.left - EDGES.right) / len(scene.blocks))
    axes.axhline(0, color=INK, alpha=0.5, linewidth=1)
    top = HEIGHT - EDGES.top - EDGES.bottom + 10
    write(axes, 4 - EDGES.left, top, scene.words.weight, size=LETTERS, weight="bold")
    if any(scene.shares):
        _draw_shares(axes, scene)
    return plot, axes


def _draw_shares(axes: Any, scene: _Scene) -> None:
    """Bars from the lowest weight; the largest ends at the highest one, where its share stands."""
    bottom, top = scene.limits
    most = max(scene.shares)
    heights = [share / most * (top - bottom) for share in scene.shares]
    colours = [colour_of(block) for block in scene.blocks]
    bars = axes.bar(range(len(heights)), heights, 0.78, bottom, color=colours, linewidth=0, zorder=0.9)
    for bar, block, share in zip(bars, scene.blocks, scene.shares, strict=True):
        bar.set_gid(f"{block}: {percent(share)}")
    width, height = scene.width - EDGES.left - EDGES.right, HEIGHT - EDGES.top - EDGES.bottom
    for part in (0.5, 1.0):
        y = (part + HEADROOM) / (1 + 2 * HEADROOM) * height
        write(axes, width + 4, y, percent(part * most), size=SMALL, va="center_baseline")
    write(axes, width + EDGES.right - 4, height + 10, scene.words.share, size=LETTERS, ha="right", weight="bold")


def _line(weights: Sequence[float], **place: Any) -> Any:
    from matplotlib.lines import Line2D

    look = {"color": INK, "linewidth": 2, "linestyle": "-", "marker": "o", "markersize": 7, "zorder": 10}
    return Line2D(range(len(weights)), weights, **look, **place)
