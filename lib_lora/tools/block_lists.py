"""Block weights as a form shows them, one for each block, whatever they were written as, and their shortest text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.errors import TagError
from lib_lora.prompt.block_names import BASE, ENCODERS, LISTS
from lib_lora.prompt.block_weights import CURVES, BlockRequest, read_list
from lib_lora.prompt.edit import fits
from lib_lora.prompt.tags import writable_name
from lib_lora.prompt.values import number_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from lib_lora.prompt.block_weights import Presets

LENGTHS = tuple(LISTS)
WHOLE: Mapping[int, int] = {12: 20, 20: 20, 17: 26, 26: 26, 61: 61}
"""Length of a list → of the one that has every block of its models."""
DECIMALS = 4
"""Of a curve's numbers in a list."""
DRAWN = "0.5"
"""What is shown for ``R`` and ``U``: the mean of what is drawn for both."""
_NONE, _ALL = "0", "1"
_LETTERS = ("R", "U", "X")


@dataclass(frozen=True)
class BlockList:
    """Weights of the blocks of a list.

    Attributes:
        items: Block → number, ``R``, ``U``, ``X`` and what else a list can hold, in the list's order.
    """

    items: Mapping[str, str]

    @classmethod
    def read(cls, text: str, presets: Presets, length: int) -> BlockList:
        """What a user wrote.

        Args:
            text: A list, or the name of a preset or a curve.
            presets: The meaning of names.
            length: Of a curve's list, and of a preset's if nothing of it is lost; a list stays as long as it is.

        Raises:
            TagError: If it can not be read.
        """
        plain = text.strip()
        if not plain:
            raise TagError("there are no block weights; write a list, or the name of a preset or a curve")
        if "," in plain:
            return cls._spelled(plain)
        if plain in presets.weights:
            found = cls._spelled(presets.weights[plain])
            return found._within(LISTS[length]) if found._fits(LISTS[length]) else found
        return cls._curve(plain, presets, length)

    @classmethod
    def of(cls, weight: float, length: int) -> BlockList:
        """The same number for every block."""
        return cls(dict.fromkeys(LISTS[length], number_text(weight)))

    @classmethod
    def _spelled(cls, text: str) -> BlockList:
        numbers = read_list(text)
        items = map(_spell, text.split(","), numbers)
        return cls(dict(zip(LISTS[len(numbers)], items, strict=True)))

    @classmethod
    def _curve(cls, name: str, presets: Presets, length: int) -> BlockList:
        weights = BlockRequest(weights=name).resolve(presets, LISTS[WHOLE[length]]).blocks
        shown = {block: weights[BASE] if block in ENCODERS else weights[block] for block in LISTS[length]}
        return cls({block: number_text(round(weight, DECIMALS)) for block, weight in shown.items()})

    @property
    def text(self) -> str:
        """As ``lbw=`` holds it."""
        return ",".join(self.items.values())

    @property
    def weights(self) -> list[float]:
        """The numbers; where the seed or the prompt gives them, the mean of what is drawn, and 1 for ``X``."""
        return read_list(",".join(DRAWN if item in ("R", "U") else item for item in self.items.values()))

    @property
    def drawn(self) -> str:
        """Those of the letters ``R``, ``U`` and ``X`` that stand for a number."""
        return "".join(letter for letter in _LETTERS if any(item.startswith(letter) for item in self.items.values()))

    def resized(self, length: int) -> BlockList:
        """The same blocks in a list of another length; others have 0, or what all have if they have the same."""
        same = {*self.items.values()}
        return self._within(LISTS[length], same.pop() if len(same) == 1 else _NONE)

    def inverted(self) -> BlockList:
        """1 - weight for each number."""
        return BlockList({block: _inverted(item) for block, item in self.items.items()})

    def _within(self, blocks: Sequence[str], other: str = _NONE) -> BlockList:
        return BlockList({block: self.items.get(block, other) for block in blocks})

    def _fits(self, blocks: Collection[str]) -> bool:
        weighed = all(block in blocks for block, item in self.items.items() if item != _NONE)
        return weighed and any(block in blocks for block in self.items if block not in ENCODERS)


def shortest_text(
    shown: BlockList, presets: Presets, present: Collection[str] | None = None, preferred: str = ""
) -> str:
    """What ``lbw=`` has to say: a name that means the same, else the shortest list; ``""`` if all blocks have 1.

    Args:
        shown: The weights.
        presets: The meaning of names.
        present: Blocks in which the LoRA has layers; what others weigh makes no difference. None if that is not known.
        preferred: A name that is tried first.
    """
    whole = WHOLE[len(shown.items)]
    matter = LISTS[whole] if present is None else [*shown.items, *present]
    if preferred and fits(preferred) and _means(preferred, presets, whole, shown, matter):
        return preferred
    if all(shown.items.get(block) == _ALL for block in matter):
        return ""
    names = (name for name in (*presets.weights, *CURVES) if fits(name) and _means(name, presets, whole, shown, matter))
    return next(names, None) or next(_lists(shown, matter, whole))


def tag_of(name: str, strength: float, weights: str) -> str:
    """A tag.

    Args:
        name: How tags name the LoRA.
        strength: Of all blocks.
        weights: Value of ``lbw``; ``""`` for none.

    Raises:
        TagError: If a tag can not hold that.
    """
    if not math.isfinite(strength) or not fits(weights):
        raise TagError(f"a tag can not hold the strength {strength:g} with the weights {weights!r}")
    arguments = [writable_name(name), number_text(strength), *([f"lbw={weights}"] if weights else [])]
    return f"<lora:{':'.join(arguments)}>"


def _means(name: str, presets: Presets, whole: int, shown: BlockList, matter: Sequence[str]) -> bool:
    """Whether a name stands for these weights."""
    try:
        found = BlockList.read(name, presets, whole)
    except TagError:
        return False
    own = {*LISTS[whole]} - ENCODERS
    return not own.isdisjoint(found.items) and _same(found, shown, matter)


def _lists(shown: BlockList, matter: Sequence[str], whole: int) -> Iterator[str]:
    for length in sorted(LENGTHS):
        if {*LISTS[length]} <= {*LISTS[whole]}:
            found = BlockList({block: shown.items.get(block, _NONE) for block in LISTS[length]})
            if _same(found, shown, matter):
                yield found.text
    yield shown.text


def _same(one: BlockList, other: BlockList, blocks: Sequence[str]) -> bool:
    return all(one.items.get(block, _NONE) == other.items.get(block, _NONE) for block in blocks)


def _spell(item: str, number: float) -> str:
    """A number as short as it can be; letters stay."""
    return item.strip() if _is_drawn(item) else number_text(round(number, 2 * DECIMALS))


def _inverted(item: str) -> str:
    return item if _is_drawn(item) else number_text(round(1 - float(item), 2 * DECIMALS))


def _is_drawn(item: str) -> bool:
    return item.strip()[:1] in _LETTERS
