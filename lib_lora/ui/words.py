"""What can follow in a tag, for the completion of prompts; the page's script asks for it when a prompt is begun."""

from __future__ import annotations

import json
from hashlib import sha256
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.prompt.block_weights import CURVES
from lib_lora.prompt.values import shorten

if TYPE_CHECKING:
    from collections.abc import Callable

    from lib_lora.hosts.host import Host
    from lib_lora.ui.texts import Texts

PROMPT = "prefuse-prompt"
"""Class of the text boxes that complete tags."""
ARGUMENTS = ("te", "unet", "dyn", "lbw", "lbwe", "start", "stop", "step", "in", "mid", "out", "hr", "hrte", "hrunet")
SHOWN_LETTERS = 40

Word = tuple[str, str, int]
"""What is written, a note on it, and whether the note is searched too."""


def words(host: Host, texts: Texts) -> dict[str, list[Word]]:
    """All that can be offered, by what stands before it in the tag.

    Args:
        host: Whose LoRAs and presets.
        texts: What the notes on arguments are.
    """
    presets = host.presets.read()
    entries = [entry for entry in host.catalog.entries() if entry.tag_name]
    loras = [(entry.tag_name, entry.alias if entry.alias != entry.name else "", 1) for entry in entries]
    weights = [(name, shorten(value, SHOWN_LETTERS), 0) for name, value in presets.weights.items()]
    return {
        "loras": sorted(loras, key=lambda word: word[0].lower()),
        "arguments": [(f"{name}=", texts(f"argument.{name}"), 0) for name in ARGUMENTS],
        "lbw": [*weights, *((curve, texts("argument.curve"), 0) for curve in CURVES)],
        "lbwe": [(name, shorten(value, SHOWN_LETTERS), 0) for name, value in presets.elements.items()],
    }


def told_words(host: Host, texts: Texts) -> Callable[[str], tuple[Any, str]]:
    """An action that tells a page what it does not know yet.

    Returns:
        Takes the digest of what the page has; gives HTML, or no change, and the digest of what it has then.
    """

    def tell(known: str) -> tuple[Any, str]:
        host.catalog.refresh()
        data = json.dumps(words(host, texts), separators=(",", ":"))
        digest = sha256(data.encode()).hexdigest()
        return gr.update() if digest == known else f'<div hidden data-words="{escape(data)}"></div>', digest

    return tell
