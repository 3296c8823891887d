"""Tables and plots of the page as files: in the folder of pictures, under the first names that are free."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from lib_lora.core.saving import output_path, save_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MOST_LETTERS = 60
_UNUSUAL = re.compile(r"[^\w-]+")


def save_exports(folder: Path, title: str, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files of one name.

    Args:
        folder: Where; made if it is not there.
        title: What the name begins with; signs that file systems may not like are replaced.
        contents: Suffix, such as ``.csv`` → bytes.

    Returns:
        The files, in the order of `contents`.

    Raises:
        OutputError: If one can not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = _UNUSUAL.sub("-", title)[:MOST_LETTERS]
    names = (f"{stem}-{number}" for number in itertools.count(1))
    free = next(name for name in names if not any((folder / f"{name}{suffix}").exists() for suffix in contents))
    paths = [output_path(folder, free, suffix) for suffix in contents]
    for path, data in zip(paths, contents.values(), strict=True):
        save_bytes(path, data)
    return paths
