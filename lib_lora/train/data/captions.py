"""From a caption's file to what the text encoder is given.

Source: process_caption of kohya's sd-scripts (library/train_util.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.train.data.order import stream

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lib_lora.train.data.options import DataOptions
    from lib_lora.train.data.order import Row


def read_caption(path: Path) -> str:
    """The first line.

    Raises:
        OSError: If the file can not be read.
        ValueError: If it is no text in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {path.name} is no text in UTF-8") from error
    return lines[0].strip() if lines else ""


def framed(caption: str, options: DataOptions) -> str:
    """With prefix and suffix."""
    return " ".join(part for part in (options.caption_prefix, caption, options.caption_suffix) if part)


def possible_captions(captions: Sequence[str], options: DataOptions) -> tuple[str, ...]:
    """Everything that `drawn_caption` can make, where nothing shuffles or drops tags; each once."""
    dropped = options.caption_dropout_rate > 0 or options.caption_dropout_every_n_epochs > 0
    return tuple(dict.fromkeys([framed(caption, options) for caption in captions] + [""] * dropped))


def drawn_caption(caption: str, row: Row, options: DataOptions) -> str:
    """The caption at a place of the training: dropped, its tags shuffled and some of them left out."""
    if _is_dropped(row, options):
        return ""
    caption = framed(caption, options)
    if not options.shuffle_caption and not options.caption_tag_dropout_rate:
        return caption
    first, tags, last = _tags(caption, options)
    chance = stream(options.seed, "tags", row.place)
    if options.shuffle_caption:
        chance.shuffle(tags)
    tags = [tag for tag in tags if chance.random() >= options.caption_tag_dropout_rate]
    return ", ".join([*first, *tags, *last])


def _is_dropped(row: Row, options: DataOptions) -> bool:
    every = options.caption_dropout_every_n_epochs
    if every and (row.epoch + 1) % every == 0:
        return True
    rate = options.caption_dropout_rate
    return rate > 0 and stream(options.seed, "dropout", row.place).random() < rate


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
