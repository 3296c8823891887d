"""Options from what people write: a TOML file and ``--key value``, checked against the types of frozen dataclasses."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import types
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Iterable

_TOML_READERS = ("tomllib", "tomli", "tomlkit", "toml")
"""The first is a part of Python since 3.11, the third comes with gradio."""
_WORDS = {"true": True, "false": False}
_NAMESPACE = {"Path": Path, "Mapping": Mapping, "Sequence": Sequence, "Literal": Literal, "Any": Any}
"""What annotations may name that modules import for checkers alone."""
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
_TOO_LARGE = {int: 2**63, float: math.inf}
_ATTRIBUTE = re.compile(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", re.MULTILINE)


def read_toml(path: Path) -> dict[str, Any]:
    """Key → value of a TOML file; sections only group, as in kohya's.

    Raises:
        JobError: If the file can not be read, or says one key twice.
    """
    return _flattened(read_tables(path), str(path))


def read_tables(path: Path) -> dict[str, Any]:
    """A TOML file as it stands.

    Raises:
        JobError: If the file can not be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise JobError(f"{path} can not be read: {error.strerror or error}") from error
    except ValueError as error:
        raise JobError(f"{path} is no TOML file: {error}") from error
    return _parsed(text, str(path))


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Key → value of a text as of `read_toml`.

    Args:
        text: The lines.
        name: Where they come from, for people.

    Raises:
        JobError: If they can not be read, or say one key twice.
    """
    return _flattened(_parsed(text, name), name)


def read_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Key → text or texts of ``--key value…``; a key without a value is a switch that is on.

    Raises:
        JobError: If there is a value without a key.
    """
    values: dict[str, Any] = {}
    key = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, is_given, text = argument[2:].partition("=")
            values[key := name.replace("-", "_")] = [text] if is_given else []
        elif key:
            values[key].append(argument)
        else:
            raise JobError(f"{argument!r} belongs to no option; write --key {argument}")
    return {name: "true" if not texts else texts[0] if len(texts) == 1 else texts for name, texts in values.items()}


def fill(groups: Mapping[str, type], values: Mapping[str, Any]) -> dict[str, Any]:
    """One dataclass for each group.

    Args:
        groups: Name → frozen dataclass; no two have a field of the same name.
        values: Key → value, as TOML or the command line give it.

    Raises:
        JobError: If there is no such option, or a value is of another type.
    """
    check_names(values, [key for kind in groups.values() for key in _hints(kind)])
    return {group: kind(**converted(kind, values)) for group, kind in groups.items()}


def check_names(values: Iterable[str], known: Collection[str], where: str = "") -> None:
    """Refuse options that there are not.

    Args:
        values: Names that were given.
        known: Those that there are.
        where: They were given, if not for the whole training.

    Raises:
        JobError: If there is one.
    """
    for key in values:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            there = f"there are {', '.join(known)}" if where else "`train --options` lists what there is"
            hint = f"did you mean {close[0]}?" if close else there
            raise JobError(f"{where}{': ' if where else ''}there is no option {key}; {hint}")


def converted(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What of key → value are fields of a dataclass, as their types.

    Raises:
        JobError: If a value is of another type.
    """
    return {key: convert(key, values[key], hint) for key, hint in _hints(kind).items() if key in values}


def convert(key: str, value: Any, hint: Any) -> Any:
    """A value as the type that is asked for.

    Raises:
        JobError: If it is none.
    """
    try:
        return _convert(value, hint)
    except (TypeError, ValueError, OverflowError):
        raise JobError(f"{key} must be {_kind(hint)}, not {value!r}") from None


def described(groups: Iterable[type]) -> list[tuple[str, Any, str]]:
    """(key, default, what it is) of every option, from the dataclasses and their docstrings."""
    rows: list[tuple[str, Any, str]] = []
    for group in groups:
        texts = {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(group.__doc__ or "")}
        for field in dataclasses.fields(group):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            rows.append((field.name, default, texts.get(field.name, "")))
    return rows


def plain(value: Any) -> Any:
    """As JSON knows it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _parsed(text: str, name: str) -> dict[str, Any]:
    reader = next(filter(None, map(_module, _TOML_READERS)), None)
    if reader is None:
        raise JobError("TOML files can not be read here; install a reader with: pip install tomli")
    try:
        return reader.loads(text)
    except (ValueError, IndexError) as error:  # the parsers' own errors are ValueErrors; toml also raises the other
        raise JobError(f"{name} is no TOML file: {str(error).splitlines()[0]}") from error


def _flattened(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in _flat(table):
        if key in values:
            raise JobError(f"{name} says {key} twice")
        values[key] = value
    return values


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _flat(table: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value


def _hints(kind: type) -> dict[str, Any]:
    """Field → type, of those that can be given."""
    hints = get_type_hints(kind, localns=_NAMESPACE)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _convert(value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _first(value, get_args(hint))
    if origin is Literal:
        return _chosen(value, get_args(hint))
    if origin in (tuple, list, Sequence):
        return _several(value, get_args(hint)[0])
    return _one(value, hint)


def _first(value: Any, hints: Sequence[Any]) -> Any:
    """As the first of several types that it can be."""
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        if hint is not type(None):
            try:
                return _convert(value, hint)
            except (TypeError, ValueError, OverflowError):
                continue
    raise TypeError


def _chosen(value: Any, choices: Sequence[Any]) -> Any:
    found = [choice for choice in choices if str(choice) == str(value)]
    if not found:
        raise ValueError
    return found[0]


def _several(value: Any, hint: Any) -> tuple[Any, ...]:
    if isinstance(value, str):  # texts may have commas in them, numbers have none
        value = [value] if hint is str else value.split(",")
    if not isinstance(value, Sequence):
        value = [value]
    return tuple(_convert(one.strip() if isinstance(one, str) else one, hint) for one in value)


def _one(value: Any, hint: Any) -> Any:
    if hint in (int, float):
        return _number(value, hint)
    if hint is Path:
        return Path(value)
    if hint is bool and isinstance(value, str):
        value = _WORDS.get(value.lower())
    if not isinstance(value, hint):
        raise TypeError
    return value


def _number(value: Any, hint: type) -> Any:
    if isinstance(value, bool) or (hint is int and isinstance(value, float) and not value.is_integer()):
        raise TypeError
    number = hint(value)
    if not abs(number) < _TOO_LARGE[hint]:
        raise ValueError
    return number


def _kind(hint: Any) -> str:
    """Types for people."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(one) for one in inner if one is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (tuple, list, Sequence):
        return "texts" if inner[0] is str else f"{_kind(inner[0]).removeprefix('a ')}s with commas between them"
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))
