"""Changing the texts in a file's header: what is to change is collected, shown, and then written at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lib_lora.core.saving import output_path
from lib_lora.errors import JobError
from lib_lora.tools.metadata import edit_metadata
from lib_lora.ui.inspection import cut
from lib_lora.ui.markup import message, table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import Host
    from lib_lora.tools.inspect import Inspection
    from lib_lora.tools.metadata import MetadataEdit
    from lib_lora.ui.texts import Texts

MOST_KEYS = 1000
"""To choose from; others can be typed."""


@dataclass(frozen=True)
class Edited:
    """A file that is shown, and what of its metadata is to change.

    Attributes:
        path: The file.
        found: What is in it.
        is_copy: Whether it is the page's own copy of a file that was dropped.
        changes: Key → new text, or None if it goes.
    """

    path: Path
    found: Inspection
    is_copy: bool
    changes: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])

    def keys(self) -> list[str]:
        """What there will be, and what goes."""
        return sorted({*self.found.metadata, *self.changes})[:MOST_KEYS]

    def text(self, key: str) -> str | None:
        """What it will be; None if there is no such key, or it goes."""
        return self.changes.get(key, self.found.metadata.get(key))

    def change(self, key: str, text: str | None) -> Edited:
        """With another text, or without it; what stays as it is in the file is no change."""
        others = {one: new for one, new in self.changes.items() if one != key}
        own = {} if text == self.found.metadata.get(key) else {key: text}
        return Edited(self.path, self.found, self.is_copy, others | own)

    def undone(self) -> Edited:
        """Nothing is to change."""
        return Edited(self.path, self.found, self.is_copy)

    def target(self, host: Host, name: str, *, replace: bool) -> Path | None:
        """Where it goes: a checkpoint to the models, all else to the LoRAs; None for the file itself.

        Args:
            host: Its folders.
            name: Of a new file, without suffix; ``""`` for none.
            replace: Whether the file itself may be replaced.

        Raises:
            JobError: If it is neither, or both, or the file is a copy that nobody would find.
            UnsafePathError: If the name is none.
        """
        if bool(name) == replace:
            raise JobError("give the new file a name, or tick that the file itself is replaced; one of both")
        if replace and self.is_copy:
            raise JobError("a dropped file is a copy of yours, which stays as it is; give the new file a name")
        if replace:
            return None
        folder = host.model_folder if self.found.kind == "checkpoint" else host.catalog.folders[0]
        folder.mkdir(parents=True, exist_ok=True)
        return output_path(folder, name)

    def save(self, host: Host, name: str, *, replace: bool, progress: Progress) -> MetadataEdit:
        """Write it.

        Args:
            host: As of `target`.
            name: As of `target`.
            replace: As of `target`.
            progress: Told the bytes written.

        Raises:
            FileError: If the file can not be read, or the new one not be written.
            JobError: As of `target`, or if nothing is to change.
        """
        target = self.target(host, name, replace=replace)
        new = {key: text for key, text in self.changes.items() if text is not None}
        removed = [key for key, text in self.changes.items() if text is None]
        return edit_metadata(self.path, new, removed, out=target, overwrite=replace, progress=progress)


def changes_panel(texts: Texts, edited: Edited | None) -> str:
    """What is to change: key, before, after."""
    if edited is None or not edited.changes:
        return message(texts("inspect.no_changes"))
    head = [texts(f"inspect.{word}") for word in ("key", "before", "after")]
    before = edited.found.metadata
    rows = [
        (cut(key), cut(before.get(key, "–")), texts("inspect.removed") if text is None else cut(text))
        for key, text in edited.changes.items()
    ]
    return table(head, rows)
