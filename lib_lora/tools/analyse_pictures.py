"""What each block of a LoRA does to a picture, by making it with that block alone, or without it."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from lib_lora.core.blocks import OUTSIDE
from lib_lora.errors import JobError
from lib_lora.prompt.block_names import LISTS
from lib_lora.prompt.edit import with_block_weights
from lib_lora.prompt.tags import TAG_NAMES, TAG_PATTERN
from lib_lora.tools.grid import beside, draw_grid, in_cell
from lib_lora.tools.table import csv_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    Mode = Literal["only", "without"]
    Draw = Callable[[str], Image.Image | Sequence[Image.Image]]
    Told = Callable[[int, int, str], None]

NONE, WHOLE = "no LoRA", "whole"
"""Of the pictures that no block is named after."""
LARGEST = 255
MOST_ROWS = 7
"""Of a grid, before it goes on beside."""
CELL = 256
"""Side of a picture in a grid in pixels."""
_HEADER = ("block", "drawn", "rms", "differing")


@dataclass(frozen=True, eq=False)
class Change:
    """What a block does.

    Attributes:
        block: Its name, or ``whole`` for the LoRA as a whole.
        drawn: Whether pictures were made; a block that the LoRA has not changes nothing.
        rms: Root of the mean squared difference, over all pixels and colours, from 0 to 255.
        differing: Part of the pixels that differ at all.
        picture: The first that was made.
        difference: Largest difference of each pixel's colours, grey; as much brighter as the brightest pixel of all
            blocks allows, so that blocks can be compared.
    """

    block: str
    drawn: bool
    rms: float
    differing: float
    picture: Image.Image
    difference: Image.Image


@dataclass(frozen=True, eq=False)
class PictureAnalysis:
    """What each block does to a picture.

    Attributes:
        mode: ``only``: each block alone, compared with no LoRA; ``without``: all others, compared with the whole LoRA.
        base: Without the LoRA.
        whole: With all of it, compared with `base`.
        changes: Of each block, in the list's order.
        brighter: What differences were multiplied by in the pictures of them.
    """

    mode: Mode
    base: Image.Image
    whole: Change
    changes: tuple[Change, ...]
    brighter: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without pictures."""
        rows = [dict(zip(_HEADER, row, strict=True)) for row in self._rows()]
        return {"mode": self.mode, "brighter": self.brighter, "changes": rows}

    def to_csv(self) -> str:
        """A line for the whole LoRA, and one for each block."""
        return csv_of(_HEADER, self._rows())

    def grid(self, cell: int = CELL) -> Image.Image:
        """All pictures and differences on one sheet, with names and numbers.

        Args:
            cell: Side of a picture in pixels.
        """
        empty = Image.new("RGB", (1, 1))
        rows = [(NONE, self.base, empty)]
        rows += [(_label(change), change.picture, change.difference) for change in (self.whole, *self.changes)]
        parts = [rows[start : start + MOST_ROWS] for start in range(0, len(rows), MOST_ROWS)]
        return beside([_sheet(part, cell, f"difference x {self.brighter:.3g}") for part in parts])

    def _rows(self) -> list[tuple[str, str, float, float]]:
        changes = (self.whole, *self.changes)
        return [(one.block, "yes" if one.drawn else "no", one.rms, one.differing) for one in changes]


def analyse_pictures(
    draw: Draw,
    prompt: str,
    *,
    tag: int = 1,
    length: int,
    present: Collection[str],
    mode: Mode = "only",
    progress: Told = lambda _done, _total, _what: None,
) -> PictureAnalysis:
    """Make a picture without a LoRA, with it, and with each of its blocks alone or left out.

    Args:
        draw: Makes the picture, or pictures of one size, of a prompt; the same for the same prompt.
        prompt: With the LoRA's tag. What the tag says of block weights is left out, the rest stays.
        tag: Which LoRA tag of the prompt, from 1.
        length: Of the list of block weights; it has to have all blocks of the LoRA.
        present: The blocks that the LoRA has layers in, see `analyse.BlockAnalysis.present`. The others are not drawn.
            Layers outside of all blocks act in every picture with the LoRA, as no list weighs them.
        mode: Whether each block is alone, or left out.
        progress: Told before each picture how many are done, how many there are, and which is next; what it raises
            ends the job.

    Raises:
        JobError: If there is no such tag, no such list, a block of the LoRA is not in it, or the pictures differ in
            size or number.
    """
    blocks = _checked_blocks(length, present)
    names = [NONE, WHOLE, *(block for block in blocks if block in present)]
    drawn: dict[str, NDArray[np.uint8]] = {}
    for done, name in enumerate(names):
        progress(done, len(names), name)
        drawn[name] = _pixels(draw(_prompt(prompt, tag, _weights(name, blocks, mode))), drawn)
    progress(len(names), len(names), "")
    return _compare(drawn, blocks, mode)


def compare_pair(block: str, before: Image.Image, after: Image.Image) -> tuple[Change, float]:
    """How two pictures differ.

    Args:
        block: A name for what makes the difference.
        before: What is compared with.
        after: The other.

    Returns:
        The change, and what its picture of the difference was multiplied by.

    Raises:
        JobError: If they differ in size.
    """
    ground = _pixels(before, {})
    pixels = _pixels(after, {block: ground})
    brighter = LARGEST / max(1, _largest(pixels, ground))
    return _change(block, pixels, ground, brighter), brighter


def _sheet(rows: Sequence[tuple[str, Image.Image, Image.Image]], cell: int, difference: str) -> Image.Image:
    pictures = [[in_cell(picture, cell) for picture in pair] for _, *pair in rows]
    return draw_grid(["picture", difference], [label for label, *_ in rows], pictures, cell)


def _label(change: Change) -> str:
    if not change.drawn:
        return f"{change.block}\nnot in the LoRA"
    return f"{change.block}\nRMS {change.rms:.3g}\n{change.differing:.1%} of pixels"


def _checked_blocks(length: int, present: Collection[str]) -> Sequence[str]:
    if length not in LISTS:
        raise JobError(f"there is no list of {length} block weights; take one of {', '.join(map(str, LISTS))}")
    if missing := sorted(set(present) - {*LISTS[length], OUTSIDE}):
        raise JobError(
            f"{len(missing)} blocks of the LoRA are not in the list of {length}, the first is {missing[0]}; "
            "take a longer list"
        )
    return LISTS[length]


def _weights(name: str, blocks: Sequence[str], mode: Mode) -> str:
    """The list for a picture; ``""`` for the one without the LoRA."""
    if name == NONE:
        return ""
    own, others = (1, 0) if mode == "only" else (0, 1)
    numbers = [1 if name == WHOLE else own if block == name else others for block in blocks]
    return f"lbw={','.join(map(str, numbers))}"


def _prompt(prompt: str, number: int, weights: str) -> str:
    """The prompt with other block weights in its n-th LoRA tag, or without that tag."""
    tags = [match for match in TAG_PATTERN.finditer(prompt) if match.group(1) in TAG_NAMES]
    if not 1 <= number <= len(tags):
        raise JobError(f"the prompt has {len(tags)} LoRA tags, number {number} is not among them")
    tag = tags[number - 1]
    new = with_block_weights(tag.group(), weights) if weights else ""
    return prompt[: tag.start()] + new + prompt[tag.end() :]


def _pixels(pictures: Image.Image | Sequence[Image.Image], others: dict[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """(pictures, height, width, 3)."""
    several = pictures if isinstance(pictures, AnySequence) else [pictures]
    sizes = {picture.size for picture in several}
    if len(sizes) != 1:
        raise JobError(f"pictures of one prompt have {len(sizes)} sizes; one is needed to compare them")
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in several])
    for other in others.values():
        if other.shape != pixels.shape:
            raise JobError(
                f"pictures differ in size or number, {other.shape[:3]} and {pixels.shape[:3]}; keep them equal"
            )
    return pixels


def _compare(drawn: dict[str, NDArray[np.uint8]], blocks: Sequence[str], mode: Mode) -> PictureAnalysis:
    base, whole = drawn[NONE], drawn[WHOLE]
    ground = base if mode == "only" else whole
    peaks = [_largest(pixels, ground) for name, pixels in drawn.items() if name not in (NONE, WHOLE)]
    brighter = LARGEST / max([1, _largest(whole, base), *peaks])
    changes = tuple(_change(block, drawn.get(block), ground, brighter) for block in blocks)
    return PictureAnalysis(mode, _picture(base), _change(WHOLE, whole, base, brighter), changes, brighter)


def _change(block: str, pixels: NDArray[np.uint8] | None, ground: NDArray[np.uint8], brighter: float) -> Change:
    shown = ground if pixels is None else pixels
    difference = shown.astype(np.float32) - ground
    largest = np.abs(difference).max(axis=-1)
    rms = float(np.sqrt(np.square(difference, dtype=np.float64).mean()))
    bright = Image.fromarray((largest[0] * brighter).clip(0, LARGEST).astype(np.uint8))
    return Change(block, pixels is not None, rms, float((largest > 0).mean()), _picture(shown), bright)


def _largest(pixels: NDArray[np.uint8], ground: NDArray[np.uint8]) -> int:
    return int(np.abs(pixels.astype(np.int16) - ground).max())


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[0])
