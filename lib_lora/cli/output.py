"""What commands tell: results on stdout, how far they are on stderr."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lib_lora.core.saving import Progress


def tell(data: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """One result on stdout, for people or for programs."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str) if as_json else text)


@contextmanager
def bar(title: str, unit: str = "B") -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal.

    Args:
        title: What stands before it.
        unit: Of what is counted; bytes by default.
    """
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, unit_scale=True, disable=None, leave=False) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
