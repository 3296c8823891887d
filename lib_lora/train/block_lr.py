"""Learning rates of the UNet's blocks: ``down_lr_weight``, ``mid_lr_weight``, ``up_lr_weight``, and where a block is.

Source: kohya's networks/lora.py (sd-scripts): 12 + 1 + 12 blocks in SD1 and SD2, and in SDXL 9 + 3 + 9 between the time
and label embeddings and the output head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.models import BaseModel
from lib_lora.errors import JobError
from lib_lora.prompt.block_weights import CURVES, curve
from lib_lora.prompt.values import shorten
from lib_lora.train.option_values import convert

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTSIDE = -1
"""Index of what lies in no block: text encoders, and SD1's embeddings and output head."""

_CURVE = re.compile(rf"({'|'.join(CURVES)})(?:\+(.*))?", re.DOTALL)
_BEFORE, _AFTER = ("time_embed", "label_emb"), ("out",)


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of a UNet, as kohya counts them.

    Attributes:
        down: Input blocks.
        mid: Parts of the middle block that have numbers of their own.
        up: Output blocks.
        ends: 1 if the embeddings and the output head are blocks too, the first and the last.
    """

    down: int
    mid: int
    up: int
    ends: int

    @property
    def count(self) -> int:
        """Of all blocks: how long ``block_dims`` is."""
        return self.down + self.mid + self.up + 2 * self.ends

    def index(self, path: str) -> int:
        """Number of the block that a layer is in, or `OUTSIDE`.

        Args:
            path: Dotted, in the original library's spelling: ``input_blocks.4.1.proj_in``.
        """
        kind, _, rest = path.partition(".")
        number = rest.partition(".")[0]
        if kind == "input_blocks":
            return self.ends + int(number)
        if kind == "middle_block":
            return self.ends + self.down + min(int(number), self.mid - 1)
        if kind == "output_blocks":
            return self.ends + self.down + self.mid + int(number)
        if self.ends and kind in _BEFORE:
            return 0
        return self.count - 1 if self.ends and kind in _AFTER else OUTSIDE


_SD = BlockLayout(down=12, mid=1, up=12, ends=0)
_SDXL = BlockLayout(down=9, mid=3, up=9, ends=1)


def layout_of(family: BaseModel) -> BlockLayout:
    """The blocks of a family; one that is not known counts as SD1."""
    return _SDXL if family is BaseModel.SDXL else _SD


class Curve(NamedTuple):
    """Weights that follow a curve from the first block to the last.

    Attributes:
        shape: One of `CURVES`.
        raised: What is added to each.
    """

    shape: str
    raised: float = 0.0

    def over(self, count: int) -> tuple[float, ...]:
        """The weights of so many blocks."""
        return tuple(self.raised + curve(self.shape, index / max(count - 1, 1)) for index in range(count))

    def __str__(self) -> str:
        """As kohya writes it."""
        return f"{self.shape}+{self.raised:g}" if self.raised else self.shape


def read_weights(name: str, value: str | Sequence[float]) -> Curve | tuple[float, ...]:
    """``sine+0.25``, or numbers; an empty item of a text is 0.

    Args:
        name: Of the option.
        value: A text with commas, a curve, or a list.

    Raises:
        JobError: If it is neither, or a single number, where kohya's script fails: it may be meant for one or for all.
    """
    text = value.strip() if isinstance(value, str) else ""
    if match := _CURVE.fullmatch(text):
        return Curve(match[1], convert(f"what is added to the curve of {name}", match[2] or 0.0, float))
    if text[:1].isalpha():
        raise JobError(f"{name} names no curve {shorten(text)!r}; there are {', '.join(CURVES)}, each also with +0.25")
    items = [item.strip() or 0.0 for item in text.split(",")] if isinstance(value, str) else value
    numbers = tuple(convert(f"number {index} of {name}", item, float) for index, item in enumerate(items, 1))
    if len(numbers) == 1 and name != "mid_lr_weight":
        every = f"zeros+{numbers[0]:g}"
        raise JobError(f"{name} is one number for many blocks, {numbers[0]:g}; write {every} for all, or a list")
    return numbers


class LrWeights(NamedTuple):
    """Factors of the UNet's learning rate.

    Attributes:
        blocks: One for each block; what is not above the threshold is 0.
        notes: Sentences about what was given and not used, or not given.
    """

    blocks: tuple[float, ...]
    notes: tuple[str, ...] = ()


def block_weights(
    down: Curve | Sequence[float] | None,
    mid: Sequence[float] | None,
    up: Curve | Sequence[float] | None,
    layout: BlockLayout,
    threshold: float = 0.0,
) -> LrWeights | None:
    """The factor of each block, or None if no option gives any.

    Args:
        down: Of the input blocks, or None for 1; a short list is filled up with 1, of a long one the rest is not used.
        mid: Of the middle.
        up: Of the output blocks.
        layout: The model's blocks.
        threshold: ``block_lr_zero_threshold``: a factor that is not above it is 0.
    """
    if down is None and mid is None and up is None:
        return None
    given = (("down", down, layout.down), ("mid", mid, layout.mid), ("up", up, layout.up))
    parts = [_part(weights, count) for _, weights, count in given]
    ends = (1.0,) * layout.ends
    weights = (*ends, *(value for part in parts for value in part), *ends)
    notes = (_note(f"{name}_lr_weight", weights, count) for name, weights, count in given)
    return LrWeights(tuple(value if value > threshold else 0.0 for value in weights), tuple(filter(None, notes)))


def _part(weights: Curve | Sequence[float] | None, count: int) -> tuple[float, ...]:
    if isinstance(weights, Curve):
        return weights.over(count)
    return (*(weights or ()), *(1.0,) * count)[:count]


def _note(name: str, weights: Curve | Sequence[float] | None, count: int) -> str:
    if weights is None or isinstance(weights, Curve) or len(weights) == count:
        return ""
    what = "the rest is 1" if len(weights) < count else "the rest is not used"
    return f"{name} holds {len(weights)} numbers for {count} blocks: {what}"
