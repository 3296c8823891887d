"""Where this computer's user keeps what can be made anew."""

from __future__ import annotations

import os
from pathlib import Path

NAME = "prefuse"
VARIABLE = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"


def cache_file(name: str) -> Path | None:
    """A file's place in the cache folder, which is made; None if that can not be."""
    try:
        folder = Path(os.environ.get(VARIABLE) or Path.home() / ".cache") / NAME
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that can be written
        return None
    return folder / name
