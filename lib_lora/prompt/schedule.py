"""When a LoRA acts and how strongly: ``start= stop= step=``, strengths as curves ``0@0,1@0.5``.

Steps count from 0, in each pass anew. Source of the curves' spelling: https://github.com/cheald/sd-webui-loractl.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.errors import TagError
from lib_lora.prompt.values import number_text, read_position, read_strength, shorten

if TYPE_CHECKING:
    from collections.abc import Mapping

ARGUMENTS = frozenset({"start", "stop", "step"})
_ITEM = re.compile("[,;]")
_POSITION = re.compile("[@~]")


@dataclass(frozen=True)
class Moment:
    """A step, or a part of all steps.

    Attributes:
        value: Number of the step, or from 0 to 1.
        is_fraction: Which of the two.
    """

    value: float
    is_fraction: bool

    def is_reached(self, step: int, steps: int) -> bool:
        """Whether `step` of `steps` is this one or a later one."""
        return step >= (round(self.value * steps, 6) if self.is_fraction else self.value)

    def __str__(self) -> str:
        """As a tag spells it."""
        return repr(self.value) if self.is_fraction else number_text(self.value)


@dataclass(frozen=True)
class Curve:
    """A strength that runs straight from point to point, and stays before the first and behind the last.

    Attributes:
        positions: Ascending: steps, or parts of the pass, of which 1 is its last step.
        weights: One for each.
        text: As the tag spells it.
    """

    positions: tuple[float, ...]
    weights: tuple[float, ...]
    text: str

    def at(self, step: int, steps: int) -> float:
        """The strength in `step` of `steps`."""
        position = step / max(steps - 1, 1) if self.positions[-1] <= 1 else step
        behind = bisect_right(self.positions, position)
        if behind in (0, len(self.positions)):
            return self.weights[max(behind - 1, 0)]
        (start, end), (low, high) = self.positions[behind - 1 : behind + 1], self.weights[behind - 1 : behind + 1]
        return low + (high - low) * (position - start) / (end - start)


@dataclass(frozen=True)
class Schedule:
    """How a LoRA's strengths change in a pass.

    Attributes:
        te: Curve of the text encoders, or None for one strength. Prompts are encoded once: its start alone counts.
        unet: Curve of the UNet, or None for one strength.
        start: Off before it.
        stop: Off from it on.
    """

    te: Curve | None = None
    unet: Curve | None = None
    start: Moment | None = None
    stop: Moment | None = None

    def is_on(self, step: int, steps: int) -> bool:
        """Whether the LoRA acts in `step` of `steps`."""
        started = self.start is None or self.start.is_reached(step, steps)
        return started and not (self.stop is not None and self.stop.is_reached(step, steps))

    def __str__(self) -> str:
        """As arguments of a tag."""
        curves = {"te": self.te and self.te.text, "unet": self.unet and self.unet.text}
        named = {**curves, "start": self.start, "stop": self.stop}
        return ":".join(f"{name}={value}" for name, value in named.items() if value is not None)


def read_strength_or_curve(what: str, text: str) -> float | Curve:
    """A number, or a curve ``weight@position,weight@position``, also with ``;`` and ``~``.

    Raises:
        TagError: If it is neither, or a curve without its first position, or of parts of the pass and steps mixed.
    """
    if not _POSITION.search(text):
        return read_strength(what, text)
    points: list[tuple[float, float]] = []
    for item in _ITEM.split(text):
        weight, *position = _POSITION.split(item)
        if len(position) > 1 or not (position or points):
            raise TagError(f"{what} has the point {shorten(item)!r}; write a curve such as 0@0,1@0.5")
        place = read_position(f"a position of {what}", position[0]) if position else 1.0
        points.append((place, read_strength(what, weight)))
    points.sort(key=lambda point: point[0])
    positions, weights = zip(*points, strict=True)
    if positions[-1] > 1 and any(position % 1 for position in positions):
        raise TagError(f"{what} has positions up to 1, parts of the pass, and beyond, steps; write one kind of them")
    return Curve(positions, weights, text.strip())


def read_schedule(named: Mapping[str, str], te: float | Curve, unet: float | Curve) -> Schedule | None:
    """The schedule of a tag, or None if nothing changes in time.

    Args:
        named: Argument → value; others than `ARGUMENTS` are left alone. ``step=a-b`` counts before the other two.
        te: Strength of the text encoders.
        unet: Strength of the UNet.

    Raises:
        TagError: If an argument is no step and no fraction.
    """
    if ARGUMENTS.isdisjoint(named) and not isinstance(te, Curve) and not isinstance(unet, Curve):
        return None
    start, stop = named.get("start"), named.get("stop")
    if "step" in named:
        start, _, stop = named["step"].partition("-")
    return Schedule(
        te=te if isinstance(te, Curve) else None,
        unet=unet if isinstance(unet, Curve) else None,
        start=None if start is None else _read_moment("start", start),
        stop=None if stop is None else _read_moment("stop", stop),
    )


def _read_moment(what: str, text: str) -> Moment:
    value = read_position(what, text)
    is_fraction = "." in text and value < 1
    if value % 1 and not is_fraction:
        raise TagError(f"{what} is {shorten(text)}; write a whole step, or a part of all steps such as 0.3")
    return Moment(value, is_fraction)
