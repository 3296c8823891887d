"""Axes of the X/Y/Z plot: name, strengths, block weights and times of the n-th LoRA of the prompt."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from modules import scripts

from lib_lora.errors import TagError
from lib_lora.prompt.block_names import LISTS
from lib_lora.prompt.block_weights import CURVES, BlockRequest
from lib_lora.prompt.edit import change_tag, fits
from lib_lora.prompt.elements import SEPARATOR
from lib_lora.prompt.schedule import read_schedule, read_strength_or_curve
from lib_lora.prompt.values import number_text, read_strength, shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lib_lora.prompt.block_weights import Presets

XYZ_SCRIPT = "xyz_grid.py"
MOST_TAGS = 3
"""Tags of a prompt that have axes."""
DECIMALS = 8
"""Of a number, as the plot shows it."""


class Known(NamedTuple):
    """What values can name; each is called when it is needed.

    Attributes:
        names: Of LoRAs.
        presets: Of block weights.
        blocks: Of the loaded model, in order.
    """

    names: Callable[[], Sequence[str]]
    presets: Callable[[], Presets]
    blocks: Callable[[], Sequence[str]]


class _Axis(NamedTuple):
    """What an axis varies.

    Attributes:
        label: As the plot lists it.
        kind: What the plot makes of a value's text.
        argument: Of `change_tag`, or the name of one in the tag.
        spell: A value and what is known → its text in the tag; a TagError if it can not be.
        choices: The values to choose from, if they can be listed.
    """

    label: str
    kind: type
    argument: str
    spell: Callable[[Any, Known], str]
    choices: Callable[[Known], Sequence[str]] | None = None


def add_axes(known: Known) -> None:
    """Give the plot our axes, once."""
    plot = next((one.module for one in scripts.scripts_data if one.script_class.__module__ == XYZ_SCRIPT), None)
    if plot is None:
        return
    there = {option.label for option in plot.axis_options}
    plot.axis_options.extend(
        _option(plot, number, axis, known)
        for number in range(1, MOST_TAGS + 1)
        for axis in _AXES
        if _label(number, axis) not in there
    )


def _option(plot: Any, number: int, axis: _Axis, known: Known) -> Any:
    choices = axis.choices
    return plot.AxisOption(
        _label(number, axis),
        axis.kind,
        partial(_apply, number, axis, known),
        confirm=partial(_confirm, number, axis, known),
        choices=None if choices is None else lambda: [*choices(known)],
    )


def _label(number: int, axis: _Axis) -> str:
    return f"LoRA {number}: {axis.label}"


def _confirm(number: int, axis: _Axis, known: Known, _p: Any, values: Sequence[Any]) -> None:
    """Look at all values before the first picture.

    Raises:
        RuntimeError: If one can not be; the plot tells it.
    """
    try:
        texts = [axis.spell(value, known) for value in values]
        if axis.spell is _moment:
            _check_one_kind(values)
    except TagError as error:
        raise RuntimeError(f"{_label(number, axis)}: {error}") from error
    wrong = next((text for text in texts if axis.argument != "name" and not fits(text)), None)
    if wrong is not None:
        raise RuntimeError(f"{_label(number, axis)}: a tag can not hold {shorten(wrong)!r}")


def _apply(number: int, axis: _Axis, known: Known, p: Any, value: Any, _values: Sequence[Any]) -> None:
    """Write a value into the n-th LoRA tag of the prompt.

    Raises:
        RuntimeError: If the prompt has fewer; the plot tells it.
    """
    changed = change_tag(p.prompt, number, **{axis.argument: axis.spell(value, known)})
    if changed is None:
        raise RuntimeError(f"{_label(number, axis)}: the prompt has no {number} LoRA tags; add one to vary")
    p.prompt = changed


def _strength(value: float, _known: Known) -> str:
    return number_text(round(read_strength("the strength", value), DECIMALS))


def _moment(value: float, _known: Known) -> str:
    text = number_text(round(value, DECIMALS))
    read_schedule({"start": text}, 1.0, 1.0)
    return text


def _check_one_kind(moments: Sequence[float]) -> None:
    if any(0 < one < 1 for one in moments) and max(moments) >= 1:
        raise TagError("there are parts of all steps, below 1, and steps, from 1 on; write one kind of them")


def _curve(value: str, _known: Known) -> str:
    read_strength_or_curve("the curve", value)
    return value


def _weights(value: str, known: Known) -> str:
    BlockRequest(weights=value).resolve(known.presets(), known.blocks())
    return value


def _elements(value: str, known: Known) -> str:
    text = value.replace(":", SEPARATOR)
    BlockRequest(elements=text).resolve(known.presets(), known.blocks())
    return text


def _single_block(value: str, known: Known) -> str:
    """``IN04`` or ``IN04=0.5`` as a list in which all other blocks have 0."""
    block, equals, weight = map(str.strip, value.partition("="))
    blocks = known.blocks()
    if block not in blocks:
        raise TagError(f"the model has no block {shorten(block)!r}; it has {', '.join(blocks) or 'none with a name'}")
    number = number_text(read_strength("the weight", weight) if equals else 1.0)
    order = next(LISTS[length] for length in (26, 61) if block in LISTS[length])
    return ",".join(number if one == block else "0" for one in order)


def _fitting_presets(known: Known) -> list[str]:
    """Presets that weigh blocks of the model, and curves."""
    presets, blocks = known.presets(), known.blocks()
    own = {length for length, order in LISTS.items() if not set(blocks).isdisjoint(order[2:])}
    return [*(name for name, text in presets.weights.items() if text.count(",") + 1 in own and fits(name)), *CURVES]


_AXES = (
    _Axis("name", str, "name", lambda value, _: value, lambda known: known.names()),
    _Axis("te strength", float, "te", _strength),
    _Axis("unet strength", float, "unet", _strength),
    _Axis("block preset", str, "lbw", _weights, _fitting_presets),
    _Axis("single block", str, "lbw", _single_block, lambda known: known.blocks()),
    _Axis("element", str, "lbwe", _elements),
    _Axis("start", float, "start", _moment),
    _Axis("stop", float, "stop", _moment),
    _Axis("curve", str, "unet", _curve),
)
