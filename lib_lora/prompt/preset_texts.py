"""Texts of preset files: read, and edited so that all else stays as it is.

Source of both formats: https://github.com/hako-mikan/sd-webui-lora-block-weight, whose files these are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.errors import PresetError, TagError
from lib_lora.prompt.block_names import LISTS
from lib_lora.prompt.block_weights import SHIPPED_ELEMENTS, SHIPPED_WEIGHTS, has_own_meaning, read_list
from lib_lora.prompt.elements import SEPARATOR, read_rules
from lib_lora.prompt.values import shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

MOST_LETTERS = 80
"""Of a preset's name."""
MOST_REFUSED = 20
"""Faults of one text that are told one by one."""
_BYTE_ORDER_MARK = "\ufeff"
_SEPARATORS = re.compile("[:;,=<>|#]")


class ImportedTexts(NamedTuple):
    """What a text with presets holds.

    Attributes:
        presets: Name → value, as a file spells it.
        refused: Why some are not among them, one sentence each.
    """

    presets: dict[str, str]
    refused: tuple[str, ...]


@dataclass(frozen=True)
class PresetFormat:
    """How a file says what names in an argument mean.

    Attributes:
        argument: Of a tag, such as ``lbw``.
        file_name: Of the file.
        shipped: Name → value, where no file says it.
        divide: A text → its parts, one preset in each at most; joined they are the text again.
        read: A part → name and value, or None if it is a comment or something else.
        spell: A value → the same as the file spells it; a TagError if it is none.
        gap: Whether an empty line must stand between two presets.
    """

    argument: str
    file_name: str
    shipped: Mapping[str, str]
    divide: Callable[[str], list[str]]
    read: Callable[[str], tuple[str, str] | None]
    spell: Callable[[str], str]
    gap: bool

    def presets(self, text: str) -> dict[str, str]:
        """Name → value; of a name that is there twice, the later."""
        return dict(found for part in self._parts(text) if (found := self.read(part)))

    def with_preset(self, text: str, name: str, value: str) -> str:
        """The text with another value of a preset, at its place; of a new one, at the end."""
        parts = self._parts(text)
        places = [index for index, part in enumerate(parts) if self._name(part) == name]
        if not places:
            return self.with_new(text, {name: value})
        parts[places[-1]] = f"{name}:{value}{_end(parts[places[-1]])}"
        return "".join(parts)

    def with_new(self, text: str, presets: Mapping[str, str]) -> str:
        """The text with presets behind it."""
        line_end = next((end for end in ("\r\n", "\n", "\r") if end in text), "\n")
        lines = text.removeprefix(_BYTE_ORDER_MARK).splitlines(keepends=True)
        before = line_end if lines and not lines[-1].endswith(("\n", "\r")) else ""
        gap = line_end if self.gap else ""
        before += gap if lines and lines[-1].strip() else ""
        return text + before + gap.join(f"{name}:{value}{line_end}" for name, value in presets.items())

    def without(self, text: str, name: str) -> str:
        """The text without a preset."""
        return "".join(part for part in self._parts(text) if self._name(part) != name)

    def renamed(self, text: str, old: str, new: str) -> str:
        """The text with another name of a preset."""
        parts = self._parts(text)
        return "".join(
            f"{new}:{part.partition(':')[2]}" if self._name(part) == old else part  # the value stays as it is spelled
            for part in parts
        )

    def imported(self, text: str) -> ImportedTexts:
        """The good presets of somebody else's text, and what is wrong with the others."""
        presets: dict[str, str] = {}
        refused: list[str] = []
        line = 1
        for part in self.divide(text.removeprefix(_BYTE_ORDER_MARK)):
            found = self.read(part)
            if found or (part.strip() and "#" not in part):
                name, value = found or part.partition(":")[::2]
                try:
                    presets[checked_name(name)] = self.spell(value)
                except (PresetError, TagError) as error:
                    refused.append(f"line {line}: {error}")
            line += len(part.splitlines())
        more = len(refused) - MOST_REFUSED
        rest = (f"{more} more are refused for such reasons",) if more > 0 else ()
        return ImportedTexts(presets, (*refused[:MOST_REFUSED], *rest))

    def _parts(self, text: str) -> list[str]:
        mark = text[: text.startswith(_BYTE_ORDER_MARK)]
        return [mark, *self.divide(text[len(mark) :])]

    def _name(self, part: str) -> str | None:
        found = self.read(part)
        return found and found[0]


def checked_name(name: str) -> str:
    """A name that a new preset can have, without spaces around it.

    Raises:
        PresetError: If a tag or a file could not hold it, or it means something there already.
    """
    plain = name.strip()
    if not plain or len(plain) > MOST_LETTERS:
        raise PresetError(f"a name of a preset has 1 to {MOST_LETTERS} letters, and {shorten(plain)!r} {len(plain)}")
    if _SEPARATORS.search(plain) or not plain.isprintable():
        raise PresetError(
            f"{shorten(plain)!r} is no name of a preset; leave out line breaks, invisible letters, and : ; , = < > | #"
        )
    if has_own_meaning(plain):
        raise PresetError(f"{shorten(plain)!r} means something of its own in a tag; choose another name for the preset")
    return plain


def names_like(name: str) -> Iterator[str]:
    """A name, and then the same with numbers behind it."""
    yield name
    for number in count(2):
        end = f" {number}"
        yield f"{name[: MOST_LETTERS - len(end)].rstrip()}{end}"


def _end(part: str) -> str:
    """Line ends and empty lines behind a part."""
    return part[len(part.rstrip()) :]


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _sections(text: str) -> list[str]:
    """What empty lines separate, with the empty lines behind it."""
    return list(map("".join, _grouped(_lines(text))))


def _grouped(lines: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for line in lines:
        if group and line.strip() and not group[-1].strip():
            yield group
            group = []
        group.append(line)
    yield group


def _read_line(part: str) -> tuple[str, str] | None:
    """Of ``NAME:list``; what lies behind another colon is ignored, as there."""
    name, *rest = part.split(":")
    if rest and "#" not in part and rest[0].count(",") + 1 in LISTS:
        return name.strip(), rest[0].strip()
    return None


def _read_section(part: str) -> tuple[str, str] | None:
    """Of ``NAME:rules``."""
    name, colon, rules = part.partition(":")
    return (name.strip(), "\n".join(rules.splitlines()).rstrip()) if colon else None


def _spell_list(text: str) -> str:
    read_list(text)
    return "".join(text.split())


def _spell_rules(text: str) -> str:
    rules = read_rules(text)
    if not rules:
        raise TagError("a preset of elements has no rules; write such as IN05:attn2:0.5")
    return ",".join(rule.text.replace(SEPARATOR, ":") for rule in rules)


WEIGHTS = PresetFormat("lbw", "lbwpresets.txt", SHIPPED_WEIGHTS, _lines, _read_line, _spell_list, gap=False)
"""Lines ``NAME:list``; others are comments."""
ELEMENTS = PresetFormat("lbwe", "elempresets.txt", SHIPPED_ELEMENTS, _sections, _read_section, _spell_rules, gap=True)
"""``NAME:rules``, separated by empty lines."""
