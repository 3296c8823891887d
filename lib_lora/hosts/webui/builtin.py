"""The built-in LoRA extension, where it is on."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from modules import patches

from lib_lora.prompt.tags import writable_name

if TYPE_CHECKING:
    from collections.abc import Callable

OWNER = "prefuse"
METHOD = "get_alias"


def builtin_networks() -> Any:
    """Its module of networks, or None if the extension is off."""
    return sys.modules.get("networks")


def file_on_disk(path: str | os.PathLike[str]) -> Any:
    """Its record of a LoRA file, or None."""
    networks = builtin_networks()
    if networks is None:
        return None
    real = os.path.realpath(path)
    return next((one for one in networks.available_networks.values() if os.path.realpath(one.filename) == real), None)


def spell_writable_names(name_of: Callable[[str], str]) -> None:
    """Make its cards and pasted prompts spell every LoRA so that a tag can hold it; ``:`` and ``>`` would end the name.

    Args:
        name_of: Called with a file whose name or alias no tag can hold; gives another spelling, or ``""``.
    """
    restore_names()
    if builtin_networks() is None:
        return

    def get_alias(on_disk: Any) -> str:
        alias = original(on_disk)
        return alias if writable_name(alias) == alias else name_of(on_disk.filename) or alias

    original = patches.patch(OWNER, sys.modules["network"].NetworkOnDisk, METHOD, get_alias)


def restore_names() -> None:
    """Its own spelling again."""
    kind = getattr(sys.modules.get("network"), "NetworkOnDisk", None)
    if patches.original(OWNER, kind, METHOD) is not None:
        patches.undo(OWNER, kind, METHOD)
