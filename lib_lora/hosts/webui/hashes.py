"""Short hashes of LoRA files: in infotexts, and back from them when one is pasted."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from modules import shared

from lib_lora.catalog import EMPTY_HASH, SHORT_HASH_LETTERS
from lib_lora.hosts.webui.builtin import file_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lib_lora.catalog import LoraCatalog
    from lib_lora.report import AppliedLora

_NO_HASH = EMPTY_HASH[:SHORT_HASH_LETTERS]


class UnambiguousHashes(dict[str, Any]):
    """Short hash → the built-in extension's record of the file, if it means one file only.

    By this table the WebUI changes names in a pasted prompt. The hash of nothing, which some trainers gave all their
    files, and one that two files have, would silently put another LoRA there.
    """

    def __init__(self, files: Iterable[Any]) -> None:
        super().__init__()
        self._paths: dict[str, set[str]] = {}
        for file in files:
            if file.shorthash:
                self[file.shorthash] = file

    def __setitem__(self, short: str, file: Any) -> None:
        paths = self._paths.setdefault(short, set())
        paths.add(os.path.realpath(file.filename))
        if len(paths) > 1 or short == _NO_HASH:
            self.pop(short, None)
        else:
            super().__setitem__(short, file)

    def clear(self) -> None:
        """Forget all files."""
        self._paths.clear()
        super().clear()


def short_hashes(catalog: LoraCatalog, applied: Iterable[AppliedLora]) -> dict[str, str]:
    """Name in the prompt → twelve digits of each LoRA's hash, computed at the first use of a file."""
    return {lora.name: _short_hash(catalog, lora) for lora in applied}


def _short_hash(catalog: LoraCatalog, lora: AppliedLora) -> str:
    on_disk = file_on_disk(lora.path)
    if shared.cmd_opts.no_hashing:
        return getattr(on_disk, "shorthash", None) or ""
    value = catalog.data_hash(catalog.find(lora.name))
    if value and on_disk is not None and not on_disk.hash:
        on_disk.set_hash(value)  # what pasting an infotext looks up
    return value[:SHORT_HASH_LETTERS]
