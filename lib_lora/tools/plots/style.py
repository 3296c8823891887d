"""The look of all plots: colours, sizes, axes, and texts of files in them."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from lib_lora.core.opening import shown
from lib_lora.core.saving import check_output, save_bytes
from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

INK = "#1f2430"
"""Of texts, axes and lines; in SVG the colour of the page's text stands for it."""
COLOURS = {"BASE": "#b5679a", "IN": "#1f7fc0", "M": "#d55e00", "OUT": "#009069", "D": "#1f7fc0", "S": "#009069"}
"""Of a block, by its name without the number: Okabe's and Ito's, for all kinds of colour vision, of a lightness that
is told apart from white and from black. Source: https://jfly.uni-koeln.de/color/."""
BAR_COLOUR = COLOURS["IN"]
OTHER_COLOUR = "#7d8590"
WIDTH = 560
"""In pixels; a plot may be shown half as wide again, and smaller."""
PNG_SCALE = 2
LETTERS, TITLE, SMALL = 12.5, 13.0, 11.5
"""Size of texts in pixels."""
LINE_HEIGHT = 1.15
"""As a part of the letters' size."""
LETTER_WIDTH, WIDE_LETTER_WIDTH = 0.6, 1.02
"""The same; of most letters, and of those of Chinese and Japanese."""
_WIDE_LETTERS = frozenset("MWmw@%…")
GRID_ALPHA = 0.16
DOTS_PER_INCH = 72


class Edges(NamedTuple):
    """What is beside of axes, in pixels."""

    left: float = 46
    right: float = 12
    top: float = 26
    bottom: float = 26


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        figure: Of matplotlib, one unit to a pixel.
        label: What it shows, for those who can not see it.
    """

    figure: Any
    label: str

    def svg(self) -> str:
        """As an element of a page, transparent, its texts in the colour of the page's; as wide as its place."""
        from lib_lora.tools.plots.renderers import SvgRenderer

        renderer = SvgRenderer(*self.figure.bbox.size)
        self.figure.draw(renderer)
        return renderer.document(self.label)

    def png(self) -> bytes:
        """As a picture on white."""
        from PIL import Image

        from lib_lora.tools.plots.renderers import PixelRenderer

        self.figure.set_dpi(DOTS_PER_INCH * PNG_SCALE)
        width, height = self.figure.bbox.size
        renderer: Any = PixelRenderer(width, height, self.figure.dpi)
        self.figure.draw(renderer)
        self.figure.set_dpi(DOTS_PER_INCH)
        pixels = renderer.buffer_rgba()
        drawn = Image.frombytes("RGBA", (pixels.shape[1], pixels.shape[0]), bytes(pixels))
        paper = Image.new("RGBA", drawn.size, "white")
        data = BytesIO()
        Image.alpha_composite(paper, drawn).convert("RGB").save(data, "png")
        return data.getvalue()

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the PNG.

        Args:
            path: The .png file to be.
            overwrite: Whether an older file is replaced.

        Raises:
            JobError: If it has another suffix.
            OutputError: If the picture can not be written.
        """
        if path.suffix.lower() != ".png":
            raise JobError(f"{shown(path)} must end in .png, for that is what is drawn")
        check_output(path, overwrite=overwrite)
        save_bytes(path, self.png(), overwrite=overwrite)


def new_plot(label: str, width: float, height: float) -> Plot:
    """A drawing without anything on it.

    Raises:
        JobError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise JobError("drawing needs matplotlib; install it with: pip install matplotlib") from error
    size = (width / DOTS_PER_INCH, height / DOTS_PER_INCH)
    figure: Any = Figure(size, dpi=DOTS_PER_INCH, facecolor="none", edgecolor="none")
    return Plot(figure, label)


def add_axes(plot: Plot, edges: Edges, title: str = "", grid: str = "y") -> Any:
    """Axes with nothing but what the data are read by.

    Args:
        plot: Where.
        edges: What is beside of them.
        title: One line over them.
        grid: Which axis has lines across the data: ``x``, ``y`` or none.
    """
    width, height = plot.figure.bbox.size
    size = (width - edges.left - edges.right, height - edges.top - edges.bottom)
    place = (edges.left / width, edges.bottom / height, size[0] / width, size[1] / height)
    axes = plot.figure.add_axes(place, facecolor="none")
    axes.set_axisbelow(True)
    axes.grid(visible=False)
    if grid:
        axes.grid(visible=True, axis=grid, color=INK, alpha=GRID_ALPHA, linewidth=1, linestyle="-")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(colors=INK, labelsize=SMALL, length=0, pad=4)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        write(axes, -edges.left + 4, size[1] + 9, title, size=TITLE, most=width - 8, weight="bold")
    return axes


def write(axes: Any, x: float, y: float, text: str, *, size: float = SMALL, most: float = 0, **look: Any) -> None:
    """A line of text.

    Args:
        axes: Where.
        x: Pixels from their left.
        y: Pixels from their bottom.
        text: Any.
        size: Of the letters.
        most: Width where it is cut, or 0.
        look: As matplotlib has it.
    """
    text = fit(text, size, most) if most else plain(text)
    axes.annotate(text, (0, 0), (x, y), "axes fraction", "offset points", fontsize=size, color=INK, **look)


def name_blocks(axes: Any, blocks: Sequence[str], pitch: float) -> None:
    """The blocks along the x axis, upright where they are close.

    Args:
        axes: With block n at x = n.
        blocks: Their names.
        pitch: Pixels from one to the next.
    """
    upright = any(width_of(block, SMALL) + 4 > pitch for block in blocks)
    axes.set_xticks(range(len(blocks)), [fit(block, SMALL, 60) for block in blocks], rotation=90 if upright else 0)
    axes.set_xlim(-0.6, len(blocks) - 0.4)


def add_bars(axes: Any, blocks: Sequence[str], heights: Sequence[float], texts: Sequence[str], pitch: float) -> None:
    """Bars with a text over each.

    Args:
        axes: With nothing in them.
        blocks: What the bars are of.
        heights: As many, not negative.
        texts: As many.
        pitch: Pixels from one to the next.
    """
    upright = any(width_of(text, SMALL) > pitch for text in texts)
    bars = axes.bar(range(len(blocks)), heights, 0.78, color=[colour_of(block) for block in blocks], linewidth=0)
    for bar, block, text in zip(bars, blocks, texts, strict=True):
        bar.set_gid(f"{block}: {text}")
    labels = axes.bar_label(bars, texts, fontsize=SMALL, color=INK, padding=2, rotation=90 if upright else 0)
    room = max((width_of(text, SMALL) if upright else SMALL) + 6 for text in texts)
    axes.set_ylim(0, (max(heights) or 1.0) * axes.bbox.height / (axes.bbox.height - room))
    for label in labels:
        label.set_clip_on(False)
    name_blocks(axes, blocks, pitch)


def colour_of(block: str) -> str:
    """Of a block's bars and dots."""
    return COLOURS.get(block.rstrip("0123456789"), OTHER_COLOUR)


def percent(part: float) -> str:
    """``12%``, ``<1%``, ``0%``."""
    return f"{part:.0%}" if part >= 0.005 or part == 0 else "<1%"


def plain(text: str) -> str:
    """Any text as one line that XML can hold; signs that only steer (such as the direction of writing) are left out."""
    return "".join(_plain_letter(letter) for letter in text)


def fit(text: str, size: float, width: float) -> str:
    """A text, cut where it would be wider than `width` pixels."""
    text = plain(text)
    if width_of(text, size) <= width:
        return text
    used = width_of("…", size)
    for index, letter in enumerate(text):
        used += width_of(letter, size)
        if used > width:
            return f"{text[:index].rstrip()}…"
    return text


def width_of(text: str, size: float) -> float:
    """About how wide a text is in pixels, in letters of `size`."""
    return size * sum(_letter_width(letter) for letter in text)


def _plain_letter(letter: str) -> str:
    if letter.isprintable():
        return letter
    if letter.isspace():
        return " "
    return "" if unicodedata.category(letter) == "Cf" else "\N{REPLACEMENT CHARACTER}"


def _letter_width(letter: str) -> float:
    if unicodedata.combining(letter):
        return 0
    is_wide = letter in _WIDE_LETTERS or unicodedata.east_asian_width(letter) in "WF"
    return WIDE_LETTER_WIDTH if is_wide else LETTER_WIDTH
