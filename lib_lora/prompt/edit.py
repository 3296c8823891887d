"""Changing LoRA tags in a prompt's text."""

from __future__ import annotations

from lib_lora.prompt.block_weights import ARGUMENTS as BLOCK_ARGUMENTS
from lib_lora.prompt.tags import TAG_NAMES, TAG_PATTERN


def change_tag(
    text: str, number: int, *, name: str | None = None, te: str | None = None, unet: str | None = None
) -> str | None:
    """The prompt with other values in its n-th LoRA tag, or None if it has fewer; other arguments stay as they are.

    Args:
        text: A prompt.
        number: Which tag, from 1.
        name: Another LoRA, or None for the same.
        te: Another strength of the text encoders; the UNet's stays what it was.
        unet: Another strength of the UNet; the text encoders' stays what it was.
    """
    end = text.rfind(">") + 1
    tags = [match for match in TAG_PATTERN.finditer(text, 0, end) if match.group(1) in TAG_NAMES]
    if not 1 <= number <= len(tags):
        return None
    match = tags[number - 1]
    arguments = match.group(2).split(":")
    if name is not None:
        arguments = _renamed(arguments, name)
    if te is not None or unet is not None:
        arguments = _with_strengths(arguments, te, unet)
    return f"{text[: match.start()]}<{match.group(1)}:{':'.join(arguments)}>{text[match.end() :]}"


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


def _is_named(argument: str) -> bool:
    return argument.count("=") == 1
