"""Labelled grids of pictures."""

from __future__ import annotations

import inspect
import textwrap
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

FONT_SIZE = 15
LETTER_WIDTH = 8  # of the default font at FONT_SIZE, in pixels, rounded up
LINE_HEIGHT = 19
GAP = 8
ROW_LABEL_WIDTH = 150
PAPER, INK = "white", "black"


def draw_grid(
    columns: Sequence[str], rows: Sequence[str], pictures: Sequence[Sequence[Image.Image]], cell: int
) -> Image.Image:
    """Pictures in rows, each enlarged to `cell` x `cell` pixels, with a label over each column and left of each row.

    Args:
        columns: Labels; a line break is kept.
        rows: Labels.
        pictures: One sequence per row, as long as `columns`.
        cell: Side of a picture in the grid in pixels.
    """
    heads = [wrap(label, cell) for label in columns]
    top = GAP + LINE_HEIGHT * max(head.count("\n") + 1 for head in heads)
    size = (ROW_LABEL_WIDTH + len(columns) * (cell + GAP), top + GAP + len(rows) * (cell + GAP))
    sheet = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(sheet), _font()
    for column, head in enumerate(heads):
        pen.multiline_text((ROW_LABEL_WIDTH + column * (cell + GAP), GAP), head, INK, font)
    for row, (label, line) in enumerate(zip(rows, pictures, strict=True)):
        y = top + GAP + row * (cell + GAP)
        pen.multiline_text((GAP, y), wrap(label, ROW_LABEL_WIDTH - 2 * GAP), INK, font)
        for column, picture in enumerate(line):
            enlarged = picture.resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (ROW_LABEL_WIDTH + column * (cell + GAP), y))
    return sheet


def beside(sheets: Sequence[Image.Image]) -> Image.Image:
    """Grids side by side on one sheet."""
    size = (sum(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets))
    whole = Image.new("RGB", size, PAPER)
    x = 0
    for sheet in sheets:
        whole.paste(sheet, (x, 0))
        x += sheet.width
    return whole


def in_cell(picture: Image.Image, cell: int) -> Image.Image:
    """A picture of any size in the middle of a square of `cell` pixels."""
    factor = cell / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    how = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(picture.resize((width, height), how), ((cell - width) // 2, (cell - height) // 2))
    return square


def wrap(label: str, width: int) -> str:
    """The label in lines of at most `width` pixels."""
    letters = max(width // LETTER_WIDTH, 1)
    return "\n".join(part for line in label.split("\n") for part in textwrap.wrap(line, letters) or [""])


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if "size" in inspect.signature(ImageFont.load_default).parameters:
        return ImageFont.load_default(FONT_SIZE)
    return ImageFont.load_default()  # Pillow before 10.1 has one size
