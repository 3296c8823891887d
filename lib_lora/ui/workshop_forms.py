"""What a form of the workshop is: what is asked for, and how the answers become a call of a tool."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lib_lora.core.saving import output_path
from lib_lora.errors import JobError, ModelError, UnsafePathError
from lib_lora.prompt.values import shorten
from lib_lora.tools.given import prompted_loras

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import Host
    from lib_lora.tools.outcome import Outcome

Kind: TypeAlias = Literal["tags", "lora", "model", "options", "whole", "number", "tick", "text"]
Values: TypeAlias = "Mapping[str, Any]"

NONE = "–"
"""The option that leaves the choice to the tool."""
SUFFIX = ".safetensors"
SUGGESTED_LETTERS = 80


@dataclass(frozen=True)
class Field:
    """What is asked for.

    Attributes:
        name: The argument that the answer becomes.
        kind: ``tags`` of a prompt, a ``lora`` or ``model`` of the host's, one of `options`, a ``whole`` or any other
            ``number``, a ``tick``, a ``text``.
        value: At first.
        options: What can be chosen.
        words: Their key, after ``workshop.``; by default the name.
        when: Other fields → their values with which this one counts; else it is neither shown nor used.
    """

    name: str
    kind: Kind
    value: Any = None
    options: tuple[str, ...] = ()
    words: str = ""
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])

    def counts(self, values: Values) -> bool:
        """Whether it is shown and used beside these values of the others."""
        return all(values[name] in wanted for name, wanted in self.when.items())


@dataclass(frozen=True)
class Form:
    """A job of the workshop.

    Attributes:
        key: Of its words.
        makes: ``lora`` or ``model``, which says where the result goes.
        fields: What is asked for.
        run: Called with the host, the answers, ``out``, ``overwrite``, ``preview`` and ``progress``.
        suggest: A name for the result, from what stands in the fields; ``""`` as long as nothing there can name it.
        is_folder: Whether the result is a folder, by the answers.
    """

    key: str
    makes: Literal["lora", "model"]
    fields: tuple[Field, ...]
    run: Callable[..., Outcome]
    suggest: Callable[[Values], str]
    is_folder: Callable[[Values], bool] = lambda _: False

    def folder(self, host: Host) -> Path:
        """Where the result goes."""
        return host.catalog.folders[0] if self.makes == "lora" else host.model_folder

    def suggestion(self, host: Host, values: Values) -> str:
        """As `suggest`, a plain name that nothing in the folder has yet."""
        stem, folder = PurePath(self.suggest(values)).name[:SUGGESTED_LETTERS].strip(". "), self.folder(host)
        for number in itertools.count(1):
            name = stem if number == 1 else f"{stem}-{number}"
            try:
                taken = any(output_path(folder, name, suffix).exists() for suffix in (SUFFIX, ""))
            except UnsafePathError:
                return ""
            if not taken:
                return name
        return ""

    def start(
        self, host: Host, values: Values, name: str, *, replace: bool, preview: bool, progress: Progress
    ) -> Outcome:
        """Do the job, or tell what it would do.

        Args:
            host: Whose files are meant.
            values: What stands in the fields, by their names.
            name: Of the result, without folder and suffix; ``""`` for the suggested one.
            replace: Whether an older file is replaced.
            preview: Whether nothing is written.
            progress: As of the tool.

        Raises:
            PrefuseError: If an answer is missing or none for the job; whatever the tool raises.
        """
        given = {one.name: ANSWERS[one.kind](host, one, values[one.name]) for one in self.fields if one.counts(values)}
        name = name or self.suggestion(host, values)
        out = output_path(self.folder(host), name, "" if self.is_folder(given) else SUFFIX)
        out.parent.mkdir(parents=True, exist_ok=True)
        return self.run(host, **given, out=out, overwrite=replace, preview=preview, progress=progress)


def _lora(host: Host, one: Field, value: Any) -> Path:
    if not value:
        raise JobError("no LoRA is chosen; choose one of the list")
    return host.catalog.find(str(value)).path


def _model(host: Host, one: Field, value: Any) -> Path | None:
    if value == one.value == NONE:
        return None
    models = host.models()
    if not value:
        raise JobError("no model is chosen; choose one of the list")
    if value not in models:
        raise ModelError(f"there is no model {shorten(str(value))!r}; choose one of the list")
    return models[value]


def _option(host: Host, one: Field, value: Any) -> str | None:
    if value not in one.options:
        raise JobError(f"{one.name} is {shorten(str(value))!r}; choose one of {', '.join(one.options)}")
    return None if value == NONE else value


def _number(host: Host, one: Field, value: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise JobError(f"{one.name} is empty or no number; write one") from error


ANSWERS: Mapping[Kind, Callable[[Host, Field, Any], Any]] = MappingProxyType(
    {
        "tags": lambda host, _, value: prompted_loras(str(value or ""), host.catalog),
        "lora": _lora,
        "model": _model,
        "options": _option,
        "whole": partial(_number, kind=int),
        "number": partial(_number, kind=float),
        "tick": lambda _, __, value: bool(value),
        "text": lambda _, __, value: str(value or "").strip() or None,
    }
)
"""Kind of a field → what stands in it as an argument."""
