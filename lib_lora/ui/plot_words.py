"""Texts of the plots in the page's language."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from lib_lora.tools.plots.words import Words

if TYPE_CHECKING:
    from lib_lora.ui.texts import Texts


def plot_words(texts: Texts) -> Words:
    """What stands in the plots."""
    return Words(**{field.name: texts(f"plot.{field.name}") for field in fields(Words)})
