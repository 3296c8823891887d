"""From a caption's file to what the text encoder is given.

Source: process_caption of kohya's sd-scripts (library/train_util.py). Where theirs puts the prefix before the first of
several lines and the suffix behind the last, here each line has both.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from lib_lora.train.data.order import stream

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    from lib_lora.train.data.options import DataOptions
    from lib_lora.train.data.order import Row

_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
"""A brace that was doubled, or texts to choose from."""


def read_caption(path: Path, *, all_lines: bool = False) -> str:
    """The first line, or all that are not empty.

    Raises:
        OSError: If the file can not be read.
        ValueError: If it is no text in UTF-8.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {path.name} is no text in UTF-8") from error
    return "\n".join(filter(None, lines)) if all_lines else "".join(lines[:1])


def framed(caption: str, options: DataOptions) -> str:
    """With prefix and suffix."""
    return " ".join(part for part in (options.caption_prefix, caption, options.caption_suffix) if part)


def possible_captions(caption: str, options: DataOptions) -> list[str]:
    """Everything that `drawn_caption` can make of one caption, where nothing shuffles, drops or chooses tags."""
    dropped = options.caption_dropout_rate > 0 or options.caption_dropout_every_n_epochs > 0
    return [_separated(framed(caption, options), options), *[""] * dropped]


def drawn_caption(caption: str, row: Row, options: DataOptions) -> str:
    """The caption at a place of the training: dropped, chosen, its tags shuffled and some of them left out."""
    if _is_dropped(row, options):
        return ""
    if options.enable_wildcard:
        caption = _chosen(caption, options, stream(options.seed, "wildcards", row.place))
    else:
        caption = framed(caption, options)
    if options.shuffle_caption or options.caption_tag_dropout_rate or options.token_warmup_step:
        caption = ", ".join(_drawn_tags(caption, row, options))
    return _separated(caption, options)


def _is_dropped(row: Row, options: DataOptions) -> bool:
    every = options.caption_dropout_every_n_epochs
    if every and (row.epoch + 1) % every == 0:
        return True
    rate = options.caption_dropout_rate
    return rate > 0 and stream(options.seed, "dropout", row.place).random() < rate


def _chosen(caption: str, options: DataOptions, chance: Random) -> str:
    """One of the lines, and one of the texts in each pair of braces; doubled braces are single ones."""

    def choose(found: re.Match[str]) -> str:
        return found[0][0] if found[1] is None else chance.choice(found[1].split("|"))

    return _WILDCARD.sub(choose, framed(chance.choice(caption.split("\n")), options))


def _drawn_tags(caption: str, row: Row, options: DataOptions) -> list[str]:
    first, tags, last = _tags(caption, options)
    tags = tags[: _warm(len(tags), row.step, options)]
    chance = stream(options.seed, "tags", row.place)
    if options.shuffle_caption:
        chance.shuffle(tags)
    return [*first, *(tag for tag in tags if chance.random() >= options.caption_tag_dropout_rate), *last]


def _warm(count: int, step: int, options: DataOptions) -> int:
    """How many of so many tags are used."""
    steps, least = options.token_warmup_step, options.token_warmup_min
    return math.floor(step * ((count - least) / steps)) + least if step < steps else count


def _tags(caption: str, options: DataOptions) -> tuple[list[str], list[str], list[str]]:
    """Those kept at the beginning, those that may move, and those kept at the end."""
    mark = options.keep_tokens_separator
    if mark and mark in caption:
        first, tags, last = [*caption.split(mark, 2), ""][:3]
        return _split(first, options), _split(tags, options), _split(last, options)
    tags = _split(caption, options)
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def _split(caption: str, options: DataOptions) -> list[str]:
    """Tags, without empty ones."""
    return [tag for tag in map(str.strip, caption.split(options.caption_separator)) if tag]


def _separated(caption: str, options: DataOptions) -> str:
    """Tags that stayed together are separated as all are."""
    second = options.secondary_separator
    return caption.replace(second, options.caption_separator) if second else caption
