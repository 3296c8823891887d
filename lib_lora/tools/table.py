"""Tables as CSV for spreadsheets."""

from __future__ import annotations

import csv
from io import StringIO
from typing import TYPE_CHECKING

from lib_lora.core.saving import save_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    Cell = str | int | float | None

ENCODING = "utf-8-sig"
"""Its first bytes tell spreadsheets that it is UTF-8."""
DIGITS = 6
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a text begins with that a spreadsheet would compute. Source: OWASP, CSV injection."""


def csv_of(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Lines of CSV (RFC 4180).

    Args:
        header: Names of the columns.
        rows: Their cells. A text stays a text in a spreadsheet, with ``'`` before what would be a formula; a number
            has a point and six digits; None is empty.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows([_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def save_csv(text: str, path: Path, *, overwrite: bool = False) -> None:
    """Write a table.

    Args:
        text: As `csv_of` gives it.
        path: The file to be.
        overwrite: Whether an older file is replaced.

    Raises:
        OutputError: If it can not be written.
    """
    save_bytes(path, text.encode(ENCODING, "replace"), overwrite=overwrite)


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return f"'{cell}" if cell.startswith(_FORMULA) else cell
    return str(cell) if isinstance(cell, int) else f"{cell:.{DIGITS}g}"
