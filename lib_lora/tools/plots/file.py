"""A LoRA file at a glance: how much it changes each block, and with which ranks."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from lib_lora.errors import JobError
from lib_lora.prompt.block_names import ORDER
from lib_lora.tools.plots.style import (
    LETTERS,
    TITLE,
    WIDTH,
    Edges,
    Plot,
    add_axes,
    add_bars,
    colour_of,
    name_blocks,
    new_plot,
    percent,
    write,
)
from lib_lora.tools.plots.words import ENGLISH, Words

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lib_lora.tools.inspect import Inspection

HEIGHT = 470
UPPER = Edges(left=50, top=78, bottom=HEIGHT - 258)
LOWER = Edges(left=50, top=296, bottom=52)
NARROWEST_BAR = 13.0
"""Pixels from one bar to the next, of blocks with names."""
LARGEST_DOT = 130.0
"""Area in square pixels."""


def save_plot(found: Inspection, path: Path, *, overwrite: bool = False) -> None:
    """Write the picture.

    Args:
        found: What was found in a LoRA file.
        path: The .png file to be.
        overwrite: Whether an older file is replaced.

    Raises:
        JobError: If the file is no LoRA, or matplotlib is not installed.
        OutputError: If the picture can not be written.
    """
    draw_file(found).save(path, overwrite=overwrite)


def draw_file(found: Inspection, words: Words = ENGLISH) -> Plot:
    """Norms and ranks of its blocks.

    Args:
        found: What was found in a LoRA file.
        words: Texts of the plot.

    Raises:
        JobError: If the file is no LoRA, or matplotlib is not installed.
    """
    if not found.layers:
        reason = found.problem or f"it is {'a checkpoint' if found.kind == 'checkpoint' else 'no LoRA'}"
        raise JobError(f"there is nothing to draw of {found.path}: {reason}")
    blocks = sorted({layer.block for layer in found.layers}, key=_place)
    width = max(WIDTH, UPPER.left + UPPER.right + NARROWEST_BAR * len(blocks))
    name = found.path.replace("\\", "/").rpartition("/")[2]
    plot = new_plot(words.file.format(name=name), width, HEIGHT)
    pitch = (width - UPPER.left - UPPER.right) / len(blocks)
    upper = _draw_norms(plot, found, blocks, pitch, words)
    top = HEIGHT - UPPER.bottom - UPPER.top
    write(upper, 4 - UPPER.left, top + 56, name, size=TITLE, most=width - 8, weight="bold")
    write(upper, 4 - UPPER.left, top + 37, _facts(found, words), size=LETTERS, most=width - 8)
    _draw_ranks(plot, found, blocks, pitch, words)
    return plot


def _place(block: str) -> tuple[int, str]:
    """Where a block stands among the others."""
    return (ORDER.index(block) if block in ORDER else len(ORDER)), block


def _facts(found: Inspection, words: Words) -> str:
    norms = [layer.norm for layer in found.layers if layer.norm is not None]
    kinds = Counter(layer.algorithm for layer in found.layers)
    algorithms = ", ".join(f"{kind} ({count})" if len(kinds) > 1 else kind for kind, count in kinds.items())
    missing = len(found.layers) - len(norms)
    whole = f"‖ΔW‖ = {math.hypot(*norms):.3g}" if norms else words.need_model
    unknown = f" {words.without.format(count=missing)}" if norms and missing else ""
    layers = words.layers.format(count=len(found.layers))
    return f"{found.base_model or words.unknown_model} · {algorithms} · {layers} · {whole}{unknown}"


def _draw_norms(plot: Plot, found: Inspection, blocks: Sequence[str], pitch: float, words: Words) -> Any:
    norms, shares = found.block_norms(), found.block_shares()
    axes = add_axes(plot, UPPER, words.norms)
    texts = [percent(shares[block]) if block in norms else "?" for block in blocks]
    add_bars(axes, blocks, [norms.get(block, 0.0) for block in blocks], texts, pitch)
    axes.set_xticks([])
    return axes


def _draw_ranks(plot: Plot, found: Inspection, blocks: Sequence[str], pitch: float, words: Words) -> None:
    counts = Counter((layer.block, layer.rank) for layer in found.layers)
    most = max(counts.values())
    axes = add_axes(plot, LOWER, words.ranks.format(most=most))
    for (block, rank), count in counts.items():
        dot = axes.scatter(blocks.index(block), rank, max(8.0, LARGEST_DOT * count / most), colour_of(block))
        dot.set(linewidth=0, gid=f"{block}: {count} of rank {rank}")
    axes.set_ylim(0, 1.25 * max(rank for _, rank in counts))
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    name_blocks(axes, blocks, pitch)
