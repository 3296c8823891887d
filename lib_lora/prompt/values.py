"""Values of a tag's arguments: numbers within limits, as Python reads them, and how a sentence shows a user's text."""

from __future__ import annotations

import math

from lib_lora.errors import TagError

MAX_STRENGTH = 100.0
MAX_RANK = 1_000_000
MAX_STEP = 1_000_000
MAX_NUMBER_LETTERS = 1000
"""Longer texts are no number: some Python versions take minutes to read an integer of a million digits."""
SHOWN_LETTERS = 60


def read_strength(what: str, value: str | float) -> float:
    """A finite number of at most `MAX_STRENGTH` in size.

    Args:
        what: How the sentence names it.
        value: A text or a number.

    Raises:
        TagError: If it is not that.
    """
    return _read_number(what, value, -MAX_STRENGTH, MAX_STRENGTH)


def read_position(what: str, text: str) -> float:
    """A step or a part of all steps: a number from 0 to `MAX_STEP`.

    Raises:
        TagError: If it is not that.
    """
    return _read_number(what, text, 0, MAX_STEP)


def read_rank(text: str) -> int:
    """A whole number from 0 to `MAX_RANK`.

    Raises:
        TagError: If it is not that.
    """
    try:
        rank = int(_number_text(text))
    except ValueError:
        raise TagError(f"dyn is {shorten(text)!r}, not a whole number; write a rank such as 16") from None
    if not 0 <= rank <= MAX_RANK:
        raise TagError(f"dyn is {shorten(text)}; write a rank from 0 to {MAX_RANK}")
    return rank


def number_text(number: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(float(number)).removesuffix(".0")


def shorten(text: str, letters: int = SHOWN_LETTERS) -> str:
    """A user's text as a sentence can hold it: on one line, printable, cut after some letters."""
    shown = text if len(text) <= letters else f"{text[: letters - 1]}…"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown)


def _read_number(what: str, value: str | float, least: float, most: float) -> float:
    try:
        number = float(_number_text(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, OverflowError):
        raise TagError(f"{what} is {shorten(str(value))!r}, not a number; write one such as 0.8") from None
    if not (math.isfinite(number) and least <= number <= most):
        shown = shorten(str(value))
        raise TagError(f"{what} is {shown}, beyond the limits; write a number from {least:.0f} to {most:.0f}")
    return number


def _number_text(text: str) -> str:
    if len(text) > MAX_NUMBER_LETTERS:
        raise ValueError(f"{len(text)} letters are no number")
    return text
