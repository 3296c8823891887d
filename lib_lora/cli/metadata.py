"""``metadata``: show and change the texts in a file's header."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import bar, result_options, tell
from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Iterable

SHOWN_LETTERS = 200


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="a LoRA or checkpoint (.safetensors)")
    add("--get", metavar="KEY", help="print one text as it is")
    add("--set", action="append", default=[], type=_pair, metavar="KEY=TEXT", help="may be repeated")
    add(
        "--set-file",
        action="append",
        default=[],
        type=_pair,
        metavar="KEY=PATH",
        help="the text is in a file; may be repeated",
    )
    add("--remove", action="append", default=[], metavar="KEY", help="may be repeated")
    add("--out", type=Path, help="file to be (default: FILE itself, with --force)")
    result_options(parser)


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Show, set or remove the metadata of a file; its tensors are not touched."""
    from lib_lora.tools.metadata import edit_metadata, read_metadata

    changes = dict(arguments.set) | _read(arguments.set_file)
    if changes or arguments.remove or arguments.out:
        with bar("writing") as progress:
            options = {"out": arguments.out, "overwrite": arguments.force, "preview": arguments.dry_run}
            edit = edit_metadata(arguments.file, changes, arguments.remove, **options, progress=progress)
        tell(edit.to_dict(), str(edit), as_json=arguments.json)
        return
    metadata = read_metadata(arguments.file)
    if arguments.get is None:
        lines = [f"{_printable(key)}  {_printable(text)}" for key, text in sorted(metadata.items())]
        tell(metadata, "\n".join(lines or ["no metadata"]), as_json=arguments.json)
    elif arguments.get in metadata:
        tell({arguments.get: metadata[arguments.get]}, metadata[arguments.get], as_json=arguments.json)
    else:
        raise JobError(f"{arguments.file.name} has no metadata {arguments.get!r}; without --get all of it is shown.")


def _pair(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{item!r} has no name and = before its text")
    return key, value


def _read(files: Iterable[tuple[str, str]]) -> dict[str, str]:
    try:
        return {key: Path(path).read_text(encoding="utf-8") for key, path in files}
    except (OSError, ValueError) as error:
        raise JobError(f"a text could not be read from a file: {error}.") from error


def _printable(text: str) -> str:
    """The beginning of a text, on one line that can not change the terminal."""
    short = textwrap.shorten(text, SHOWN_LETTERS)
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in short)
