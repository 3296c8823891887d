"""Which LoRA a name in a prompt means."""

from __future__ import annotations

import difflib
import unicodedata
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.prompt.tags import writable_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

COMPARED_LETTERS = 100
"""Close names are searched by their beginning: comparing takes the square of the length."""


class NamedFile(NamedTuple):
    """The names of a file at one place; a file that links lead to has several places.

    Attributes:
        key: Which file it is.
        name: File name without suffix.
        alias: The name that its metadata gives, or ``""``.
        sub_path: Path below the LoRA folder without suffix, with ``/``.
        long_path: The same with the folder's own name before it.
        is_link: If the place is a link.
    """

    key: str
    name: str
    alias: str
    sub_path: str
    long_path: str
    is_link: bool = False


class NameTable:
    """Files by name.

    What a name means, first match wins:

    1. a file name without folder and suffix; of several, the last;
    2. an alias, if it means one file only;
    3. a path below a LoRA folder, such as ``style/ink``; of several, the last;
    4. the same with the LoRA folder's own name before it, or any of these as `writable_name` spells it, if it means one
       file only;
    5. any of these in another normal form of Unicode, then in other upper and lower case, if it means one file only.

    Source: 1 and 2 are the rules of extensions-builtin/Lora of the WebUI 1.10.1.
    """

    def __init__(self, files: Sequence[NamedFile] = ()) -> None:
        """Learn the names of `files`, of which the later win."""
        self._spellings = _merged((file.key, _spellings(file)) for file in sorted(files, key=_is_link))
        self._exact = _claims(self._spellings)
        self._folded = tuple((fold, _claims(self._spellings, fold)) for fold in (_composed, _caseless))
        self._meanings = (
            _unique(self._exact)
            | {file.sub_path: file.key for file in files}
            | _unique(_claims(_merged((file.key, (file.name, file.alias)) for file in files)))
            | {file.name: file.key for file in files}
        )

    def find(self, name: str) -> str | None:
        """Key of the file that `name` means, or None."""
        if name in self._meanings:
            return self._meanings[name]
        found = (claims.get(fold(name), ()) for fold, claims in self._folded)
        return next((keys[0] for keys in found if len(keys) == 1), None)

    def claimants(self, name: str) -> Sequence[str]:
        """Keys of all files that are spelled `name`; if there are none, of those spelled like it but for the case."""
        fold, claims = self._folded[-1]
        return self._exact.get(name) or claims.get(fold(name), ())

    def tag_name(self, key: str) -> str:
        """The first spelling of a file that a tag can hold and that means this file; ``""`` if there is none.

        Short spellings come first, and those of links after the file's own.
        """
        names = (name for name in self._spellings[key] if self._meanings.get(name) == key)
        return next((name for name in names if writable_name(name) == name), "")

    def close_names(self, name: str, most: int) -> list[str]:
        """At most `most` names that tags can hold and that look like `name`, the closest first."""
        names = {_caseless(known): known for known in self._meanings if writable_name(known) == known}
        unique: dict[str, str] = {}  # a file is there under several names
        for close in difflib.get_close_matches(_caseless(name[:COMPARED_LETTERS]), names, 3 * most):
            unique.setdefault(self._meanings[names[close]], names[close])
        return list(unique.values())[:most]


def _spellings(file: NamedFile) -> Iterator[str]:
    for name in (file.name, file.sub_path, file.long_path):
        yield from (name, writable_name(name))
    yield file.alias


def _merged(names: Iterable[tuple[str, Iterable[str]]]) -> dict[str, dict[str, None]]:
    """Names by file, each once and none of them empty."""
    merged: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for key, some in names:
        merged[key] |= dict.fromkeys(filter(None, some))
    return merged


def _claims(spellings: Mapping[str, Iterable[str]], fold: Callable[[str], str] = str) -> dict[str, list[str]]:
    """The files that have each spelling, after `fold`."""
    claims: defaultdict[str, list[str]] = defaultdict(list)
    for key, names in spellings.items():
        for name in dict.fromkeys(map(fold, names)):
            claims[name].append(key)
    return dict(claims)


def _unique(claims: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: keys[0] for name, keys in claims.items() if len(keys) == 1}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _caseless(name: str) -> str:
    return _composed(name).casefold()


def _is_link(file: NamedFile) -> bool:
    return file.is_link
