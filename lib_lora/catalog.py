"""The LoRA folders: from a name to a file.

The only place where a user's name leads to a file that is read. Names are looked up among those that are there
(`NameTable` has the rules); no path is ever made of one.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.core.file_index import FileFacts, FileIndex
from lib_lora.core.files import FileIdentity, data_sha256, read_header
from lib_lora.core.folders import lora_places
from lib_lora.errors import FileError, UnknownLoraError
from lib_lora.prompt.names import NamedFile, NameTable
from lib_lora.prompt.values import shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lib_lora.core.folders import LoraPlace

MAX_NAME_LETTERS = 255
MAX_PATH_LETTERS = 1000
SHORT_HASH_LETTERS = 12
MOST_SHOWN = 3
"""Files or names in one sentence."""

_SHA256 = re.compile("[0-9a-fA-F]{64}")
# SHA-256 of nothing: what some trainers wrote as the hash of every file.
EMPTY_HASH = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@dataclass(frozen=True)
class CatalogEntry:
    """One LoRA file.

    Attributes:
        name: File name without suffix.
        path: Where it lies; may be a link.
        alias: ``ss_output_name`` of its metadata, else `name`.
        identity: Which content of the file was listed.
        notes: What to tell about it: that it can not be read, that its name means several files.
        tag_name: How a tag names it: `name` if that leads here, else a longer spelling; ``""`` if none does.
    """

    name: str
    path: Path
    alias: str
    identity: FileIdentity
    notes: tuple[str, ...] = ()
    tag_name: str = ""


class LoraCatalog:
    """The LoRAs below some folders. Safe to use from several threads.

    Attributes:
        folders: Where LoRAs are looked for, links and folders in folders included.
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]], index: str | os.PathLike[str] | None = None) -> None:
        """A catalog; the folders are read at first use.

        Args:
            folders: Folders, which need not exist. Of two files of one name the later folder's is meant.
            index: A file that remembers what was read, so that a restart reads no LoRA again; None for none.
        """
        self.folders = tuple(Path(folder).absolute() for folder in folders)
        self._index = FileIndex(None if index is None else Path(index).absolute())
        self._places: list[LoraPlace] | None = None
        self._faults: dict[str, str] = {}
        self._names = NameTable()
        self._entries: dict[str, CatalogEntry] = {}
        self._lock = threading.RLock()

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell about the index: that it was damaged, or is locked."""
        return tuple(self._index.notes)

    def refresh(self) -> None:
        """Look for new, changed and lost files. Only headers of new and changed ones are read."""
        with self._lock:
            places = [place for folder in self.folders for place in lora_places(folder)]
            aliases, faults = self._read_headers(places)
            if (places, faults) == (self._places, self._faults):
                return
            # What can not be read must not hide what can, such as a pickle beside the file it was converted to.
            ordered = sorted(places, key=lambda place: place.real not in faults)
            self._names = NameTable([_named(place, aliases[place.real]) for place in ordered])
            self._entries = _list_files(places, aliases, faults, self._names)
            self._places, self._faults = places, faults

    def entries(self) -> tuple[CatalogEntry, ...]:
        """Every file once, in the order in which the WebUI walks."""
        with self._lock:
            if self._places is None:
                self.refresh()
            return tuple(self._entries.values())

    def find(self, name: str) -> CatalogEntry:
        """The file that `name` means; the folders are looked through again if there is none or it changed.

        Raises:
            UnknownLoraError: If there is none, or if `name` could mean several.
        """
        with self._lock:
            entry = self._look_up(name)
            if entry is None or not _is_current(entry):
                self.refresh()
                entry = self._look_up(name)
            if entry is None:
                raise UnknownLoraError(self._why_unknown(name))
            return entry

    def tag_name(self, path: str | os.PathLike[str]) -> str:
        """How a tag names the file at `path`; ``""`` if none can, or if it is not one of the folders'."""
        real = os.path.realpath(path)
        with self._lock:
            if real not in self._entries:
                self.refresh()
            return self._entries[real].tag_name if real in self._entries else ""

    def data_hash(self, entry: CatalogEntry) -> str:
        """SHA-256 of the file's tensors in hex, as the WebUI knows it; ``""`` if the file can not be read.

        ``sshs_model_hash`` of the metadata counts if there is one. Else it is computed once and kept in the index.
        """
        real = os.path.realpath(entry.path)
        try:
            identity = FileIdentity.of(entry.path)
            facts = self._index.get(real, identity) or _read_facts(entry.path)
            if not facts.data_hash:
                facts = replace(facts, data_hash=data_sha256(entry.path))
                if FileIdentity.of(entry.path) == identity:
                    with self._lock:
                        self._index.put({real: (identity, facts)})
        except FileError:
            return ""
        return facts.data_hash

    def lora_hashes(self, entries: Iterable[CatalogEntry], names: Iterable[str] | None = None) -> str:
        """Value of the infotext's ``Lora hashes``: ``name: 12 hex digits, ...``.

        Args:
            entries: The LoRAs of a picture; those that can not be read are left out.
            names: How the prompt names each of them; by default as `CatalogEntry.name`.
        """
        entries = tuple(entries)
        names = [entry.name for entry in entries] if names is None else names
        hashes = {infotext_name(name): self.data_hash(entry) for name, entry in zip(names, entries, strict=True)}
        return ", ".join(f"{name}: {value[:SHORT_HASH_LETTERS]}" for name, value in hashes.items() if value)

    def _read_headers(self, places: Iterable[LoraPlace]) -> tuple[dict[str, str], dict[str, str]]:
        """Aliases and faults by real path; a header is read where the index does not know it.

        Faults are not kept in the index: what can not be read now is tried again each time.
        """
        known: dict[str, FileFacts] = {}
        new: dict[str, tuple[FileIdentity, FileFacts]] = {}
        faults: dict[str, str] = {}
        for real, place in {place.real: place for place in places}.items():
            facts = self._index.get(real, place.identity)
            if facts is None:
                try:
                    facts = _read_facts(place.path)
                    new[real] = place.identity, facts
                except FileError as error:
                    facts = FileFacts()
                    faults[real] = str(error)
            known[real] = facts
        self._index.put(new)
        return {real: facts.alias for real, facts in known.items()}, faults

    def _look_up(self, name: str) -> CatalogEntry | None:
        real = self._names.find(name)
        return None if real is None else self._entries.get(real)

    def _why_unknown(self, name: str) -> str:
        if rivals := [self._entries[real] for real in self._names.claimants(name)]:
            return f"{shorten(name)!r} could be {len(rivals)} LoRAs; {_choices(rivals)}"
        if not self._entries:
            folders = ", ".join(str(folder) for folder in self.folders)
            return (
                f"no LoRA is named {shorten(name)!r}, for there is none at all in {shorten(folders, MAX_PATH_LETTERS)}"
            )
        close = ", ".join(shorten(one, MAX_NAME_LETTERS) for one in self._names.close_names(name, MOST_SHOWN))
        advice = f"close names are: {close}" if close else "check the name, or put the file there"
        return f"no LoRA of the {len(self._entries)} in the folders is named {shorten(name)!r}; {advice}"


def infotext_name(name: str) -> str:
    """`name` as the infotext's ``Lora hashes`` spell it: without the signs that separate there."""
    return name.replace(":", "").replace(",", "")


def _named(place: LoraPlace, alias: str) -> NamedFile:
    return NamedFile(place.real, place.name, alias, place.sub_path, place.long_path, place.is_link)


def _list_files(
    places: Sequence[LoraPlace], aliases: Mapping[str, str], faults: Mapping[str, str], names: NameTable
) -> dict[str, CatalogEntry]:
    """Each file once by real path, listed where it lies rather than where a link to it is."""
    own: dict[str, LoraPlace] = {}
    for place in sorted(places, key=lambda place: place.is_link):
        own.setdefault(place.real, place)
    entries = {
        place.real: CatalogEntry(
            name=place.name,
            path=place.path,
            alias=aliases[place.real] or place.name,
            identity=place.identity,
            tag_name=names.tag_name(place.real),
        )
        for place in places
        if own[place.real] is place
    }
    return {real: replace(entry, notes=_notes(real, entries, faults, names)) for real, entry in entries.items()}


def _notes(
    real: str, entries: Mapping[str, CatalogEntry], faults: Mapping[str, str], names: NameTable
) -> tuple[str, ...]:
    entry = entries[real]
    notes = [faults[real]] if real in faults else []
    if names.find(entry.name) == real:
        rivals = [entries[other] for other in names.claimants(entry.name) if other != real]
        if rivals:
            notes.append(f"{shorten(entry.name)!r} means {_shown(entry)} here; {_choices(rivals)}")
    if not entry.tag_name:
        notes.append(f"no tag can name {_shown(entry)}, another file has its name; rename it")
    return tuple(notes)


def _choices(entries: Sequence[CatalogEntry]) -> str:
    """What to write for each of `entries`."""
    choices = [
        f"write {shorten(entry.tag_name, MAX_NAME_LETTERS)!r} for {_shown(entry)}"
        if entry.tag_name
        else f"rename {_shown(entry)}"
        for entry in entries[:MOST_SHOWN]
    ]
    more = len(entries) - MOST_SHOWN
    return ", ".join(choices) + (f", and so on for {more} more" if more > 0 else "")


def _shown(entry: CatalogEntry) -> str:
    return shorten(f"{entry.path.parent.name}/{entry.path.name}")


def _is_current(entry: CatalogEntry) -> bool:
    try:
        return FileIdentity.of(entry.path) == entry.identity
    except FileError:
        return False


def _read_facts(path: Path) -> FileFacts:
    """What the header says.

    Raises:
        FileError: If it can not be read.
    """
    metadata = read_header(path).metadata
    alias, data_hash = metadata.get("ss_output_name", ""), metadata.get("sshs_model_hash", "")
    # Trainers write "None" for no name, and the WebUI does not resolve it.
    usable = len(alias) <= MAX_NAME_LETTERS and alias.lower() != "none"
    plausible = _SHA256.fullmatch(data_hash) and data_hash != EMPTY_HASH
    return FileFacts(alias if usable else "", data_hash if plausible else "")
