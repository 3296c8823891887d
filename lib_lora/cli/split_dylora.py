"""``split-dylora``: a DyLoRA becomes one LoRA for each rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import bar, result_options, tell

if TYPE_CHECKING:
    import argparse


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    add(
        "--lora",
        type=Path,
        required=True,
        metavar="FILE",
        help="a DyLoRA, trained here or by kohya's networks.dylora",
    )
    add("--unit", type=int, required=True, help="ranks that were trained together")
    add("--out", type=Path, required=True, metavar="FILE", help="NAME.safetensors makes NAME-0004.safetensors, …")
    result_options(parser)


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Split a DyLoRA into one LoRA for each of its ranks."""
    from lib_lora.tools.dylora import split_dylora

    given = arguments
    options = {"overwrite": given.force, "preview": given.dry_run}
    with bar("split") as progress:
        split = split_dylora(given.lora, given.out, given.unit, **options, progress=progress)
    tell(split.to_dict(), str(split), as_json=given.json)
