"""Elements of block weights: rules that give layers another weight by parts of their names.

Source: https://github.com/hako-mikan/sd-webui-lora-block-weight; unlike there, the parts of a name may be joined by
dots, and a rule that can not be read is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.errors import TagError
from lib_lora.prompt.block_names import ORDER
from lib_lora.prompt.values import number_text, read_strength, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

SEPARATOR = ";"
"""Of a rule's fields in a tag, where ``:`` would end the argument."""
MOST_LETTERS = 20_000
"""Of all rules: each is compared with each layer."""
_NOT = "NOT"


@dataclass(frozen=True)
class Words:
    """What a name must hold one of, or none of.

    Attributes:
        words: Parts of names; ``""`` is in every name.
        negated: Whether it is none of.
    """

    words: tuple[str, ...]
    negated: bool

    def fit(self, name: str) -> bool:
        """Whether `name` is as asked."""
        return any(word in name for word in self.words) != self.negated


@dataclass(frozen=True)
class ElementRule:
    """``BLOCKS:ELEMENTS:RATIO``.

    Attributes:
        blocks: Which blocks.
        elements: Which layers of them.
        ratio: Their weight, instead of their block's.
        text: As a tag spells it.
    """

    blocks: Words
    elements: Words
    ratio: float
    text: str

    def fits(self, layer: str) -> bool:
        """Whether it acts on a layer.

        Args:
            layer: Its name with ``_`` between the parts, and its block behind it.
        """
        return self.blocks.fit(layer) and self.elements.fit(layer)


def read_rules(text: str) -> tuple[ElementRule, ...]:
    """Rules from a tag's argument or from a preset, separated by commas or line breaks.

    Args:
        text: ``IN05-OUT05:attn1 attn2:0.5``, also with ``;`` for ``:``. No blocks or no elements are all of them.

    Raises:
        TagError: If a rule can not be read.
    """
    if len(text) > MOST_LETTERS:
        raise TagError(f"the rules of lbwe have {len(text)} letters; write at most {MOST_LETTERS}")
    return tuple(_read_rule(rule) for rule in re.split("[,\n]", text) if rule.strip())


def _read_rule(rule: str) -> ElementRule:
    fields = rule.replace(SEPARATOR, ":").split(":")
    if len(fields) != 3:
        raise TagError(f"the rule {shorten(rule.strip())!r} of lbwe is not BLOCKS:ELEMENTS:RATIO; write IN05:attn2:0.5")
    blocks, elements = _words(fields[0]), _words(fields[1].replace(".", "_"))
    spread = tuple(block for word in blocks.words for block in _spread(word))
    ratio = read_strength("the ratio of lbwe", fields[2])
    text = SEPARATOR.join((*(" ".join(field.split()) for field in fields[:2]), number_text(ratio)))
    return ElementRule(Words(spread, blocks.negated), elements, ratio, text)


def _words(text: str) -> Words:
    words = text.split()
    negated = words[:1] == [_NOT]
    return Words(tuple(words[1:] if negated else words or ("",)), negated)


def _spread(word: str) -> Sequence[str]:
    """The blocks of ``IN05-OUT05``, in either direction; another word alone."""
    if "-" not in word:
        return (word,)
    ends = word.split("-")
    if len(ends) != 2 or not set(ends) <= set(ORDER):
        raise TagError(f"{shorten(word)!r} of lbwe is no range of blocks; write one such as IN05-OUT05")
    first, last = sorted(map(ORDER.index, ends))
    return ORDER[first : last + 1]
