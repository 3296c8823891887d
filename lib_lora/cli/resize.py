"""``resize``: a LoRA with other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import bar, result_options, tell
from lib_lora.cli.precision import dtype_of, save_precision

if TYPE_CHECKING:
    import argparse


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    add("--lora", type=Path, required=True, metavar="FILE", help="LoRA file")
    add("--rank", type=int, required=True, help="of each layer; with --dynamic, the largest")
    add("--conv-rank", type=int, help="of 3x3 convolutions (default: as --rank)")
    add("--dynamic", choices=("sv_ratio", "sv_fro", "sv_cumulative"), help="a rank for each layer by its own values")
    add("--dynamic-param", type=float, help="sv_ratio: largest ratio, such as 20; the others: part kept, such as 0.9")
    add("--kohya-ranks", action="store_true", help="the ranks of kohya's resize_lora.py")
    save_precision(parser)
    add("--out", type=Path, required=True, metavar="FILE", help=".safetensors file")
    result_options(parser)


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Change the rank of a LoRA: the best approximation of each layer."""
    from lib_lora.tools.ranks import RankRule
    from lib_lora.tools.resize import resize

    given = arguments
    rule = RankRule(given.rank, given.conv_rank, given.dynamic, given.dynamic_param, given.kohya_ranks)
    options = {"dtype": dtype_of(given.save_precision), "overwrite": given.force, "preview": given.dry_run}
    with bar("resize") as progress:
        outcome = resize(given.lora, given.out, rule, **options, progress=progress)
    tell(outcome.to_dict(), str(outcome), as_json=given.json)
