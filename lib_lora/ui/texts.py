"""The page's words: one table for each language, a file in ``texts``."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "texts"
ENGLISH = "en"
HINT = ".hint"


class Texts:
    """Words of one language; what its table lacks is English.

    Attributes:
        language: Such as ``en`` or ``zh``.
    """

    def __init__(self, language: str = ENGLISH) -> None:
        """Read the tables; a language without one is English."""
        self.language = language if language in languages() else ENGLISH
        self._table: dict[str, str] = _read(ENGLISH) | _read(self.language)

    def __call__(self, key: str, **values: object) -> str:
        """The words of `key`, with values for its ``{names}``.

        Raises:
            KeyError: If no table has it.
        """
        return self._table[key].format(**values) if values else self._table[key]

    def hint(self, key: str) -> str:
        """One sentence about a control; ``""`` if the table has none."""
        return self._table.get(key + HINT, "")


def languages() -> list[str]:
    """What there are tables of."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def language_of(locale: str) -> str:
    """The language of a locale such as ``zh_CN.UTF-8`` or ``zh-Hans``; English if there is no table of it."""
    name = locale.replace("-", "_").partition("_")[0].lower()
    return name if name in languages() else ENGLISH


def _read(language: str) -> dict[str, str]:
    return json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))
