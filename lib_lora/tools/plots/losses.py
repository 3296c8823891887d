"""The loss of a training, while it runs and after."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lib_lora.tools.plots.style import INK, OTHER_COLOUR, WIDTH, Edges, Plot, add_axes, new_plot

if TYPE_CHECKING:
    from collections.abc import Sequence

HEIGHT = 220
EDGES = Edges(left=52, right=16, top=32, bottom=26)
MOST_POINTS = 240
"""Beyond it, each point is the mean of several steps."""
MEAN_OF = 12
"""Points under the thick line's mean."""


def draw_losses(losses: Sequence[float], first: int, title: str, width: float = WIDTH) -> Plot:
    """Losses as a thin line, under a thick one of their running mean.

    Args:
        losses: Of each step, at least one.
        first: Number of the first of these steps.
        title: What the plot shows.
        width: In pixels.

    Raises:
        JobError: If matplotlib is not installed.
    """
    each = math.ceil(len(losses) / MOST_POINTS)
    parts = [losses[start : start + each] for start in range(0, len(losses), each)]
    points = [math.fsum(part) / len(part) for part in parts]
    steps = [min(first + (index + 1) * each, first + len(losses)) - 1 for index in range(len(points))]
    plot = new_plot(title, width, HEIGHT)
    axes = add_axes(plot, EDGES, title)
    axes.plot(steps, points, color=OTHER_COLOUR, alpha=0.6, linewidth=1, linestyle="-", marker="")
    axes.plot(steps, _means(points), color=INK, linewidth=2, linestyle="-", marker="")
    axes.set_xlim(first, max(first + 1, steps[-1]))
    axes.set_ylim(0, (max(points) or 1.0) * 1.05)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return plot


def _means(points: Sequence[float]) -> list[float]:
    """Of each point and those just before it."""
    windows = (points[max(0, index + 1 - MEAN_OF) : index + 1] for index in range(len(points)))
    return [math.fsum(window) / len(window) for window in windows]
