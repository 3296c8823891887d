"""Saving, renaming, deleting, importing and exporting block weight presets; other programs' changes are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.locking import editing
from lib_lora.core.opening import READ_ATTEMPTS, shown
from lib_lora.core.replacing import replacing, set_aside
from lib_lora.core.saving import check_output
from lib_lora.errors import FileChangedError, FileError, OutputError, PresetError
from lib_lora.presets import MOST_BYTES, identity_of, read_preset_text
from lib_lora.prompt.preset_texts import WEIGHTS, checked_name, names_like
from lib_lora.prompt.values import shorten

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from lib_lora.core.files import FileIdentity
    from lib_lora.prompt.preset_texts import PresetFormat


@dataclass(frozen=True)
class Imported:
    """What came of somebody else's presets.

    Attributes:
        saved: Under their own names.
        renamed: Name there → name here, where another preset has that name.
        known: Were here already, with the same value.
        refused: Why others did not come, one sentence each.
        notes: As of `PresetEditor.save`.
    """

    saved: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    known: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Content(NamedTuple):
    """A file as it is now.

    Attributes:
        identity: Of this content, or None if there is no file.
        text: Its text, ``""`` if it has a fault.
        fault: Why it can not be read, or ``""``.
    """

    identity: FileIdentity | None
    text: str = ""
    fault: str = ""


class PresetEditor:
    """Changes the preset files of some folders; comments, order and line ends of a file stay.

    A file that can not be read is never overwritten: it is renamed to ``.bak`` before there is a new one.

    Attributes:
        form: `WEIGHTS` or `ELEMENTS`.
        paths: The files; what one does not say, a later one or the shipped presets do. New presets go into the first
            that can be written.
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]], form: PresetFormat = WEIGHTS) -> None:
        self.form = form
        self.paths = tuple(dict.fromkeys(Path(folder) / form.file_name for folder in folders))

    def own(self) -> dict[str, str]:
        """Name → value of what the files say; what is shipped besides is not among it."""
        presets: dict[str, str] = {}
        for path in self.paths:
            presets = self.form.presets(_content(path).text) | presets
        return presets

    def save(self, name: str, value: str, *, replace: bool = False) -> tuple[str, ...]:
        """Write a preset into a file.

        Args:
            name: Its name.
            value: A list of weights, or rules of elements.
            replace: Whether it may take the place of another; a shipped one is back when this one is deleted.

        Returns:
            What the user has to know: a sentence if a file could not be read and was set aside.

        Raises:
            PresetError: If the name can not be used, or is another's and `replace` is not set.
            TagError: If the value can not be used.
            OutputError: If no file can be written.
        """
        name, value = checked_name(name), self.form.spell(value)

        def saved(text: str) -> str:
            _check_free(name, () if replace else self._known())
            return self.form.with_preset(text, name, value)

        return self._edit([*self._holders(name), *self._writable()][:1], saved)

    def rename(self, old: str, new: str) -> tuple[str, ...]:
        """Give a preset another name, in every file that has it.

        Raises:
            PresetError: If no file has it, or the new name can not be used or is another's.
            OutputError: If a file can not be written.
        """
        new = checked_name(new)
        _check_free(new, self._known())

        def renamed(text: str) -> str:
            _check_free(new, self.form.presets(text))
            return self.form.renamed(text, old, new)

        return self._edit(self._own_holders(old), renamed)

    def delete(self, name: str) -> tuple[str, ...]:
        """Remove a preset from every file that has it; a shipped one of that name is back then.

        Raises:
            PresetError: If no file has it.
            OutputError: If a file can not be written.
        """
        return self._edit(self._own_holders(name), lambda text: self.form.without(text, name))

    def import_file(self, path: str | os.PathLike[str]) -> Imported:
        """Save the presets of a file.

        Raises:
            FileError: If it can not be read.
            PresetError: If there would be more presets than a file holds.
            OutputError: If no file can be written.
        """
        return self.import_text(read_preset_text(Path(path)))

    def import_text(self, text: str) -> Imported:
        """Save the presets of a text. One whose name is another's gets a number behind its name.

        Raises:
            PresetError: As `import_file`.
            OutputError: As there.
        """
        presets, refused = self.form.imported(text)
        places: dict[str, str] = {}
        new: dict[str, str] = {}

        def saved(text: str) -> str:
            known = self._known()
            places.clear()
            new.clear()
            for name, value in presets.items():
                place = next(one for one in names_like(name) if known.get(one, value) == value)
                places[name] = place
                new.update({place: value} if place not in known else {})
                known[place] = value
            return self.form.with_new(text, new) if new else text

        notes = self._edit(self._writable(), saved) if presets else ()
        return Imported(
            saved=tuple(name for name, place in places.items() if place == name and name in new),
            renamed={name: place for name, place in places.items() if place != name and place in new},
            known=tuple(name for name, place in places.items() if place not in new),
            refused=refused,
            notes=notes,
        )

    def export(self, names: Iterable[str] | None = None) -> str:
        """Presets as the text of a file.

        Args:
            names: Which, shipped ones too; by default all of the files.

        Raises:
            PresetError: If there is no preset of a name.
        """
        known = self._known()
        chosen = list(self.own() if names is None else names)
        for name in chosen:
            if name not in known:
                raise _unknown(name)
        return self.form.with_new("", {name: known[name] for name in chosen})

    def _known(self) -> dict[str, str]:
        """Name → value of all presets."""
        return {**self.form.shipped, **self.own()}

    def _holders(self, name: str) -> list[Path]:
        return [path for path in self.paths if name in self.form.presets(_content_between_edits(path).text)]

    def _own_holders(self, name: str) -> list[Path]:
        """The files that have a preset: at least one."""
        if holders := self._holders(name):
            return holders
        if name in self.form.shipped:
            raise PresetError(f"{name!r} is a preset that comes with Prefuse and stays; save another one in its place")
        raise _unknown(name)

    def _writable(self) -> list[Path]:
        """The first file that can be written, alone.

        Raises:
            OutputError: If there is none.
        """
        faults: list[str] = []
        for path in self.paths:
            fault = _unwritable(path)
            if not fault:
                return [path]
            faults.append(fault)
        raise OutputError("; ".join(faults) or "there is no folder for presets; start with one for LoRAs")

    def _edit(self, paths: Sequence[Path], change: Callable[[str], str]) -> tuple[str, ...]:
        """Write what `change` makes of the files' texts, each as it is at that moment."""
        for path in paths:
            check_output(path, overwrite=True)
        return tuple(note for path in paths if (note := _edit_file(path, change)))


def _check_free(name: str, known: Collection[str]) -> None:
    if name in known:
        raise PresetError(f"there is a preset {shorten(name)!r} already; choose another name")


def _unknown(name: str) -> PresetError:
    return PresetError(f"there is no preset {shorten(name)!r} any more; load the list again")


def _unwritable(path: Path) -> str:
    """Why a file can not be written, or ``""``."""
    try:
        check_output(path, overwrite=True)
    except OutputError as error:
        return str(error)
    return ""


def _edit_file(path: Path, change: Callable[[str], str]) -> str:
    """Replace a file; a sentence if what was there is set aside, or ``""``."""
    with editing(path.parent):
        for _ in range(READ_ATTEMPTS):
            content = _content(path)
            text = change(content.text)
            if text == content.text:
                return ""
            try:
                return _write(path, content, text.encode())
            except FileChangedError:
                continue  # what another program wrote is read, and changed
    raise FileChangedError(f"{shown(path)} is being written to; try again when that is done")


def _write(path: Path, content: _Content, data: bytes) -> str:
    """Put `data` in the place of `content`.

    Raises:
        FileChangedError: If that is not what is there any more.
        PresetError: If it is too long to be read again.
        OutputError: If it can not be written.
    """
    if len(data) > MOST_BYTES:
        raise PresetError(f"{shown(path)} would have more than {MOST_BYTES >> 20} MB; delete some of its presets")
    note = ""
    with replacing(path, len(data), overwrite=True) as temp:
        temp.write(data)
        if identity_of(path) != content.identity:
            raise FileChangedError(f"{shown(path)} was changed by another program")
        if content.fault:
            note = f"{content.fault}; it is kept as {shown(set_aside(path))}, and a new file is begun"
    return note


def _content_between_edits(path: Path) -> _Content:
    """A file as it is while no other editor of ours writes: several of them can keep one from reading it.

    Raises:
        FileChangedError: If another program is writing to it.
        OutputError: If an editor of ours does not end.
    """
    if not path.parent.is_dir():
        return _Content(None)
    with editing(path.parent):
        return _content(path)


def _content(path: Path) -> _Content:
    """A file as it is now.

    Raises:
        FileChangedError: If it is being written to.
    """
    identity = identity_of(path)
    if identity is None:
        return _Content(None)
    try:
        return _Content(identity, read_preset_text(path))
    except FileChangedError:
        raise
    except FileError as error:
        return _Content(identity, fault=str(error))
