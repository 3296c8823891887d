"""A LoRA file at a glance, as a PNG: how much it changes each block, and with which ranks."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from io import BytesIO
from typing import TYPE_CHECKING, Any

from lib_lora.core.opening import shown
from lib_lora.core.saving import check_output, save_bytes
from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lib_lora.tools.inspect import Inspection

DPI = 110
HEIGHT = 6.2
NARROWEST, EDGES, BAR = 9.0, 1.8, 0.42
"""Width in inches: of the picture at least, of what is beside the bars, and of one bar with its gap."""
LARGEST_DOT = 260.0
COLOURS = {"BASE": "#8250b4", "IN": "#2f6fb7", "M": "#c2572b", "OUT": "#2a8a5c", "D": "#2f6fb7", "S": "#2a8a5c"}
"""Of a block, by its name without the number; dark enough to be told apart in grey."""
OTHER_COLOUR, TEXT, GRID = "#6b7280", "#1f2430", "#d9dde3"
# Texts of files may have signs that are markup to matplotlib.
_MARKUP = str.maketrans({"$": r"\$"})


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
    if not found.layers:
        reason = found.problem or f"it is {'a checkpoint' if found.kind == 'checkpoint' else 'no LoRA'}"
        raise JobError(f"there is nothing to draw of {found.path}: {reason}")
    if path.suffix.lower() != ".png":
        raise JobError(f"{shown(path)} must end in .png, for that is what is drawn")
    check_output(path, overwrite=overwrite)
    save_bytes(path, draw(found), overwrite=overwrite)


def draw(found: Inspection) -> bytes:
    """The picture as the bytes of a PNG.

    Args:
        found: With one layer at least.

    Raises:
        JobError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise JobError("drawing needs matplotlib; install it with: pip install matplotlib") from error
    blocks = sorted({layer.block for layer in found.layers})
    size = (max(NARROWEST, EDGES + BAR * len(blocks)), HEIGHT)
    figure: Any = Figure(size, dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(_title(found).translate(_MARKUP), color=TEXT, fontsize=11, x=0.01, ha="left", wrap=True)
    _draw_norms(upper, found, blocks)
    _draw_ranks(lower, found, blocks)
    lower.set_xticks(range(len(blocks)), blocks, rotation=90 if len(blocks) > len(COLOURS) else 0)
    for axes in (upper, lower):
        _plain(axes)
    data = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # signs that the font lacks are drawn as boxes
        figure.savefig(data, format="png")
    return data.getvalue()


def _title(found: Inspection) -> str:
    norms = [layer.norm for layer in found.layers if layer.norm is not None]
    kinds = Counter(layer.algorithm for layer in found.layers)
    algorithms = ", ".join(f"{kind} ({count})" if len(kinds) > 1 else kind for kind, count in kinds.items())
    whole = f"whole change ‖ΔW‖ = {math.hypot(*norms):.3g}" if norms else "norms need the model (--model)"
    name = found.path.replace("\\", "/").rpartition("/")[2]
    facts = f"{found.base_model or 'unknown model'} · {algorithms} · {len(found.layers)} layers"
    return f"{name}\n{facts} · {whole}"


def _draw_norms(axes: Any, found: Inspection, blocks: Sequence[str]) -> None:
    norms, shares = found.block_norms(), found.block_shares()
    heights = [norms.get(block, 0.0) for block in blocks]
    bars = axes.bar(range(len(blocks)), heights, width=0.72, color=[_colour(block) for block in blocks])
    shown_shares = [_share(shares[block]) if block in norms else "–" for block in blocks]
    axes.bar_label(bars, shown_shares, fontsize=8, color=TEXT, padding=2)
    missing = sum(layer.norm is None for layer in found.layers)
    unknown = f", without {missing} layers whose norm needs the model" if missing else ""
    axes.set_title(f"How much each block is changed: ‖ΔW‖ at strength 1, and its share of ‖ΔW‖²{unknown}")
    axes.set_ylabel("‖ΔW‖")
    axes.margins(y=0.14)


def _draw_ranks(axes: Any, found: Inspection, blocks: Sequence[str]) -> None:
    counts = Counter((layer.block, layer.rank) for layer in found.layers)
    most = max(counts.values())
    axes.scatter(
        [blocks.index(block) for block, _ in counts],
        [rank for _, rank in counts],
        s=[max(8.0, LARGEST_DOT * count / most) for count in counts.values()],
        c=[_colour(block) for block, _ in counts],
        alpha=0.75,
        linewidths=0,
    )
    axes.set_title(f"Ranks, a dot's area is the number of layers (largest: {most})")
    axes.set_ylabel("rank")
    axes.set_ylim(0, 1.25 * max(rank for _, rank in counts))
    axes.yaxis.get_major_locator().set_params(integer=True)


def _share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.005 or part == 0 else "<1%"


def _colour(block: str) -> str:
    return COLOURS.get(block.rstrip("0123456789"), OTHER_COLOUR)


def _plain(axes: Any) -> None:
    """Nothing but the data, and lines to read its values by."""
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=TEXT, labelsize=9, length=0)
    axes.title.set(fontsize=9.5, color=TEXT, ha="left", x=0)
    axes.yaxis.label.set_color(TEXT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
