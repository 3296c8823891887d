"""What commands tell: results on stdout, how far they are on stderr."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

    from lib_lora.core.saving import Progress


def result_options(parser: argparse.ArgumentParser) -> None:
    """Those of every command that writes: what is replaced, what is only tried, and how it is told."""
    add = parser.add_argument
    add("--force", action="store_true", help="replace existing files")
    add("--dry-run", action="store_true", help="make all checks, tell what would be written, and write nothing")
    add("--json", action="store_true")


def tell(data: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """One result on stdout, for people or for programs."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str) if as_json else text)


@contextmanager
def bar(title: str, unit: str = "") -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal.

    Args:
        title: What stands before it.
        unit: Of what is counted; if it is no unit for people, only the part that is done is shown.
    """
    from tqdm import tqdm

    form = None if unit else "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(desc=title, unit=unit, bar_format=form, disable=None, leave=False) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
