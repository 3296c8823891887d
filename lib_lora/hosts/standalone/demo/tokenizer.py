"""A CLIP tokenizer whose byte pairs build the demo's few words; any other text falls apart into bytes."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING

from transformers import CLIPTokenizer

from .drawing import PALETTE, SHAPES
from .networks import TOKENS

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ("a", "an", "on", "and", "with", "the", "of", "background", "picture", "outline", "stripes", *PALETTE, *SHAPES)
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def new_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the settings into `folder` and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = build_merges(WORDS)
    vocabulary = [*_bytes(), *(b + _WORD_END for b in _bytes()), *("".join(pair) for pair in merges), START, END]
    (folder / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(vocabulary)}), encoding="utf-8", newline="\n"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")
    special = {key: value for key, value in settings.items() if key.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(
        json.dumps(special, indent=2) + "\n", encoding="utf-8", newline="\n"
    )
    return CLIPTokenizer.from_pretrained(folder)


def build_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte pairs, most important first, that make every word one token."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = split(word, merges)
    return merges


def split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """`word` as CLIP's byte pair encoding cuts it: always the pair that stands first in `merges`."""
    pieces = [*word[:-1], word[-1] + _WORD_END]
    while True:
        pairs = [pair for pair in pairwise(pieces) if pair in merges]
        if not pairs:
            return pieces
        at = next(i for i in range(len(pieces)) if (pieces[i], pieces[i + 1]) == min(pairs, key=merges.index))
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]


def _bytes() -> list[str]:
    """One printable character for each byte, in the order of the byte pair encodings of GPT-2 and CLIP."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
