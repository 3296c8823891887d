"""The loaded model, as tools on files want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.errors import PrefuseError
from lib_lora.tools.inspect import GivenModel

if TYPE_CHECKING:
    from lib_lora.hosts.host import Host


def loaded_model(host: Host) -> GivenModel | None:
    """The model that a host has loaded; its weights are read from its file, for in memory LoRAs are in them.

    Returns:
        Layers without weights if its file is none that they can be read from; None if no model is loaded.
    """
    keymap = host.keymap()
    path = host.models().get(host.model())
    if keymap is None or path is None:
        return None if keymap is None else GivenModel(keymap)
    try:
        return GivenModel.of(path)
    except PrefuseError:
        return GivenModel(keymap)
