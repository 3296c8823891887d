"""Sentences for the user: under the picture and in the console."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import Any

from lib_lora.hosts.guard import logger


def tell(p: Any, text: str) -> None:
    """Show a sentence under the picture of this generation, and once in the console."""
    if text not in p.comments:
        p.comment(text)
        logger.warning("Prefuse: %s", text)
