"""Axes of the X/Y/Z plot: name and strengths of the n-th LoRA of the prompt."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from modules import scripts

from lib_lora.prompt.edit import change_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

XYZ_SCRIPT = "xyz_grid.py"
MOST_TAGS = 3
"""Tags of a prompt that have axes."""


def add_axes(names: Callable[[], Sequence[str]]) -> None:
    """Give the plot our axes, once.

    Args:
        names: Called for the names to choose from.
    """
    plot = next((one.module for one in scripts.scripts_data if one.script_class.__module__ == XYZ_SCRIPT), None)
    if plot is None:
        return
    known = {option.label for option in plot.axis_options}
    plot.axis_options.extend(axis for axis in _axes(plot, names) if axis.label not in known)


def _axes(plot: Any, names: Callable[[], Sequence[str]]) -> list[Any]:
    axes = []
    for number in range(1, MOST_TAGS + 1):
        axes += [
            plot.AxisOption(f"LoRA {number}: name", str, partial(_apply, number, "name"), choices=lambda: [*names()]),
            plot.AxisOption(f"LoRA {number}: te strength", float, partial(_apply, number, "te")),
            plot.AxisOption(f"LoRA {number}: unet strength", float, partial(_apply, number, "unet")),
        ]
    return axes


def _apply(number: int, what: str, p: Any, value: str | float, _values: Sequence[Any]) -> None:
    """Write a value into the n-th LoRA tag of the prompt.

    Raises:
        RuntimeError: If the prompt has fewer; the plot tells it.
    """
    text = value if isinstance(value, str) else f"{round(value, 8):g}"
    changed = change_tag(p.prompt, number, **{what: text})
    if changed is None:
        raise RuntimeError(f"LoRA {number}: {what}: the prompt has no {number} LoRA tags; add one to vary")
    p.prompt = changed
