"""The built-in LoRA extension, where it is on."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import os
import sys
from typing import Any


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
