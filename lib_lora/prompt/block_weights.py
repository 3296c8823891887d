"""Block weights of a tag: ``lbw=`` lists, presets and curves, ``lbwe=`` elements, ``in= mid= out=``.

A named block that a list leaves out has 0; what lies outside of all blocks (time and label embedding, output head) has
1. Source of the presets: https://github.com/hako-mikan/sd-webui-lora-block-weight; of the curves, which there are of
learning rates: https://github.com/kohya-ss/sd-scripts.
"""

from __future__ import annotations

import difflib
import math
import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.errors import TagError
from lib_lora.prompt.block_names import BASE, CLIP, ENCODERS, LISTS, ORDER, T5, THIRDS
from lib_lora.prompt.elements import SEPARATOR, read_rules
from lib_lora.prompt.values import number_text, read_strength, shorten

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lib_lora.prompt.elements import ElementRule

ARGUMENTS = frozenset({"lbw", "w", "lbwe", "x", *THIRDS})
T5_LAYER = "encoder_block_"
MOST_NAMES = 12
"""In one sentence."""

_SHIPPED = {
    "NONE": "0" * 17,
    "ALL": "1" * 17,
    "INS": "11110000000000000",
    "IND": "10001110000000000",
    "INALL": "11111110000000000",
    "MIDD": "10001111111100000",
    "OUTD": "10000000111100000",
    "OUTS": "10000000000011111",
    "OUTALL": "10000000111111111",
    "FLUXALL": "1" * 61,
}
SHIPPED_WEIGHTS = {name: ",".join(digits) for name, digits in _SHIPPED.items()} | {"ALL0.5": ",".join(["0.5"] * 17)}
SHIPPED_ELEMENTS = {
    "ATTNDEEPON": "IN05-OUT05:attn:1",
    "ATTNDEEPOFF": "IN05-OUT05:attn:0",
    "PROJDEEPOFF": "IN05-OUT05:proj:0",
    "XYZ": "::1",
}
CURVES = ("sine", "cosine", "linear", "reverse_linear", "zeros")
_CURVE = re.compile(rf"({'|'.join(CURVES)})(?:\+(.*))?", re.DOTALL)
_INHERITED = re.compile(r"X(?:([+-])(.*))?", re.DOTALL)
_DRAWN = re.compile("[RUX]")


@dataclass(frozen=True)
class Presets:
    """What names in ``lbw=`` and ``lbwe=`` mean.

    Attributes:
        weights: Name → list.
        elements: Name → rules.
    """

    weights: Mapping[str, str] = field(default_factory=lambda: SHIPPED_WEIGHTS)
    elements: Mapping[str, str] = field(default_factory=lambda: SHIPPED_ELEMENTS)


class BlockWeights(NamedTuple):
    """What block weights come to in one model.

    Attributes:
        blocks: Block → factor.
        rest: Factor of other blocks.
        rules: The last that fits a layer gives it another factor.
        text: The same as arguments of a tag, presets and drawn numbers written out; ``""`` for none.
        says_more: Whether `text` says more than the tag: something was looked up or drawn.
    """

    blocks: Mapping[str, float] = {}
    rest: float = 1.0
    rules: tuple[ElementRule, ...] = ()
    text: str = ""
    says_more: bool = False

    def of(self, block: str, layer: str) -> float:
        """Factor of a layer's ΔW.

        Args:
            block: Its block, or ``""`` for a layer outside of all.
            layer: Its name in the original library's spelling, with ``_`` between the parts.
        """
        name = f"{layer}{block}"
        return next((rule.ratio for rule in reversed(self.rules) if rule.fits(name)), self._of_block(block, layer))

    def _of_block(self, block: str, layer: str) -> float:
        if block == BASE and CLIP in self.blocks:
            block = T5 if T5_LAYER in layer else CLIP
        return self.blocks.get(block, self.rest) if block else 1.0


@dataclass(frozen=True)
class BlockRequest:
    """Block weights as a tag asks for them.

    Attributes:
        weights: List, preset or curve; ``""`` for none.
        elements: Rules or the name of a preset; ``""`` for none.
        thirds: Argument and factor of ``in=``, ``mid=``, ``out=``.
        x: What ``X`` in a list stands for.
        seed: What ``R`` and ``U`` are drawn from: equal seeds give equal numbers.
    """

    weights: str = ""
    elements: str = ""
    thirds: tuple[tuple[str, float], ...] = ()
    x: float = 1.0
    seed: str = ""

    def resolve(self, presets: Presets, blocks: Collection[str]) -> BlockWeights:
        """What that is in a model.

        Args:
            presets: The meaning of names.
            blocks: Names of the model's blocks.

        Raises:
            TagError: If a name means nothing, a preset can not be read, or the model has none of the blocks.
        """
        own = [block for block in ORDER if block in blocks and block not in ENCODERS]
        factors, written, drawn = self._weigh(presets, own)
        rest = 0.0 if self.weights else 1.0
        for third, factor in self.thirds:
            factors |= {block: factors.get(block, rest) * factor for block in THIRDS[third]}
        if factors and factors.keys().isdisjoint(own):
            have = f"its blocks are {own[0]} to {own[-1]}" if own else "its blocks have no names"
            raise TagError(f"lbw, in, mid and out weigh no block of this model, for {have}")
        rules, looked_up = self._rules(presets)
        texts = [f"lbw={written}"] if written else []
        texts += [f"lbwe={','.join(rule.text for rule in rules)}"] if rules else []
        texts += [f"{third}={number_text(factor)}" for third, factor in self.thirds]
        return BlockWeights(factors, rest, rules, ":".join(texts), drawn or looked_up)

    def _weigh(self, presets: Presets, own: Sequence[str]) -> tuple[dict[str, float], str, bool]:
        """Block → factor, the argument that gives the same, and whether that says more than the tag's."""
        text = self.weights.strip()
        if not text or ("," not in text and text not in presets.weights):
            return (_read_curve(text, own, presets) if text else {}), text, False
        numbers = read_list(presets.weights.get(text, text), self.x, self.seed)
        says_more = text in presets.weights or _DRAWN.search(text) is not None
        return dict(zip(LISTS[len(numbers)], numbers, strict=True)), ",".join(map(number_text, numbers)), says_more

    def _rules(self, presets: Presets) -> tuple[tuple[ElementRule, ...], bool]:
        """The rules, and whether they are a preset's."""
        text = self.elements.strip()
        if not text or SEPARATOR in text:
            return read_rules(text), False
        if text not in presets.elements:
            raise _unknown("lbwe", text, presets.elements)
        return read_rules(presets.elements[text]), True


def read_blocks(named: Mapping[str, str], x: str, seed: str) -> BlockRequest | None:
    """The block weights among a tag's named arguments, or None.

    Args:
        named: Argument → value; others than `ARGUMENTS` are left alone.
        x: What ``X`` stands for if ``x=`` does not say it.
        seed: What random numbers are drawn from.

    Raises:
        TagError: If a list, a rule or a number can not be read. Names are looked up later.
    """
    if ARGUMENTS.isdisjoint(named):
        return None
    weights, elements = named.get("lbw", named.get("w", "")), named.get("lbwe", "")
    thirds = tuple((third, read_strength(third, named[third])) for third in THIRDS if third in named)
    request = BlockRequest(weights, elements, thirds, read_strength("x", named.get("x", x)), seed)
    if "," in weights:
        read_list(weights, request.x)
    if SEPARATOR in elements:
        read_rules(elements)
    return request


def has_own_meaning(text: str) -> bool:
    """Whether a tag would take `text` for a curve, a random or inherited number, or a number."""
    if any(pattern.fullmatch(text) for pattern in (_CURVE, _DRAWN, _INHERITED)):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_list(text: str, x: float = 1.0, seed: str = "") -> list[float]:
    """The numbers of a list: ``0.5``; ``R`` and ``U`` drawn from 0 to 1 and -0.5 to 1.5; ``X``, ``X+0.2``, ``X-0.2``.

    Raises:
        TagError: If there are more or fewer than a list has, or one is not a number.
    """
    count = text.count(",") + 1
    if count not in LISTS:
        raise TagError(f"lbw holds {count} numbers; write 12, 17, 20 or 26 of them, or 61 for Flux")
    draw = random.Random(seed)  # noqa: S311 -- a picture's seed must give the same again
    return [_read_item(f"number {index + 1} of lbw", item, x, draw) for index, item in enumerate(text.split(","))]


def _read_item(what: str, text: str, x: float, draw: random.Random) -> float:
    item = text.strip()
    if item == "R":
        return round(draw.random(), 3)
    if item == "U":
        return round(draw.uniform(-0.5, 1.5), 3)
    inherited = _INHERITED.fullmatch(item)
    if inherited is None:
        return read_strength(what, item)
    sign, offset = inherited.groups()
    change = read_strength(what, offset) if sign else 0.0
    return read_strength(what, x - change if sign == "-" else x + change)


def _read_curve(text: str, own: Sequence[str], presets: Presets) -> dict[str, float]:
    """A curve over the model's blocks; text encoders have 1."""
    match = _CURVE.fullmatch(text)
    if match is None:
        raise _unknown("lbw", text, presets.weights)
    shape, offset = match.groups()
    raised = 0.0 if offset is None else read_strength("what is added to the curve of lbw", offset)
    last = max(len(own) - 1, 1)
    return {BASE: 1.0} | {block: raised + curve(shape, index / last) for index, block in enumerate(own)}


def curve(shape: str, position: float) -> float:
    """A block's number, of one of `CURVES`.

    Args:
        shape: The curve.
        position: From 0 at the first block to 1 at the last.
    """
    if shape == "zeros":
        return 0.0
    if shape in ("cosine", "reverse_linear"):
        position = 1 - position
    return math.sin(math.pi / 2 * position) if shape in ("sine", "cosine") else position


def _unknown(argument: str, name: str, known: Collection[str]) -> TagError:
    close = difflib.get_close_matches(name[:100], known, 3, 0.4) or sorted(known)[:MOST_NAMES]
    return TagError(f"{argument} names no preset {shorten(name)!r}; there are {', '.join(map(shorten, close))}")
