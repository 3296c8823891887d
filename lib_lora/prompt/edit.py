"""Changing LoRA tags in a prompt's text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lib_lora.prompt.block_weights import ARGUMENTS as BLOCK_ARGUMENTS
from lib_lora.prompt.tags import TAG_NAMES, TAG_PATTERN

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENDS = re.compile("[:=>]")


def change_tag(text: str, number: int, **changes: str) -> str | None:
    """The prompt with other values in its n-th LoRA tag, or None if it has fewer; other arguments stay as they are.

    Args:
        text: A prompt.
        number: Which tag, from 1.
        changes: ``name``, another LoRA; ``te`` and ``unet``, another strength, and the other of the two stays what it
            was; or any argument and its value, such as `fits` says yes to.
    """
    end = text.rfind(">") + 1
    tags = [match for match in TAG_PATTERN.finditer(text, 0, end) if match.group(1) in TAG_NAMES]
    if not 1 <= number <= len(tags):
        return None
    match = tags[number - 1]
    arguments = match.group(2).split(":")
    if "name" in changes:
        arguments = _renamed(arguments, changes.pop("name"))
    te, unet = changes.pop("te", None), changes.pop("unet", None)
    if te is not None or unet is not None:
        arguments = _with_strengths(arguments, te, unet)
    arguments = _with_named(arguments, changes)
    return f"{text[: match.start()]}<{match.group(1)}:{':'.join(arguments)}>{text[match.end() :]}"


def fits(value: str) -> bool:
    """Whether a tag can hold an argument's value as it is."""
    return _ENDS.search(value) is None


def with_block_weights(tag: str, weights: str) -> str:
    """A LoRA tag with other block weights in it, as arguments; what else it says stays."""
    kind, *arguments = tag[1:-1].split(":")
    kept = [one for one in arguments if not (_is_named(one) and one.partition("=")[0] in BLOCK_ARGUMENTS)]
    return f"<{':'.join([kind, *kept, weights])}>"


def _renamed(arguments: list[str], name: str) -> list[str]:
    """The first argument that is not named is the name."""
    first = next((index for index, one in enumerate(arguments) if not _is_named(one)), 0)
    return [*arguments[:first], name, *arguments[first + 1 :]]


def _with_strengths(arguments: list[str], te: str | None, unet: str | None) -> list[str]:
    """Both strengths as positions, for named ones would override them and ``te`` alone would feed the UNet too."""
    positional = [one for one in arguments if not _is_named(one)]
    named = dict(one.split("=") for one in arguments if _is_named(one))
    old_te = named.pop("te", positional[1] if len(positional) > 1 else "1")
    old_unet = named.pop("unet", positional[2] if len(positional) > 2 else old_te)
    rest = [f"{key}={value}" for key, value in named.items()]
    return [*positional[:1], te or old_te, unet or old_unet, *positional[3:], *rest]


def _with_named(arguments: list[str], named: Mapping[str, str]) -> list[str]:
    """Named arguments behind the others; another spelling of the same, which might count before them, goes."""
    if "lbw" in named:
        arguments = [one for one in arguments if not one.startswith("w=") or not _is_named(one)]
    if not named.keys().isdisjoint({"start", "stop"}):
        arguments = [part for one in arguments for part in _start_and_stop(one)]
    kept = [one for one in arguments if not (_is_named(one) and one.partition("=")[0] in named)]
    return [*kept, *(f"{key}={value}" for key, value in named.items())]


def _start_and_stop(argument: str) -> list[str]:
    """``step=2-10`` as two arguments; another one alone."""
    start, dash, stop = argument.removeprefix("step=").partition("-")
    if not (argument.startswith("step=") and dash and _is_named(argument)):
        return [argument]
    return [f"start={start}", f"stop={stop}"]


def _is_named(argument: str) -> bool:
    return argument.count("=") == 1
