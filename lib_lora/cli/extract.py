"""``extract``: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import bar, result_options, tell
from lib_lora.cli.precision import PRECISIONS, dtype_of

if TYPE_CHECKING:
    import argparse

RANK = 32
MIN_DIFF = 0.01


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    model = ".safetensors checkpoint or diffusers folder; SD1, SD2 or SDXL"
    add("--base", type=Path, required=True, metavar="MODEL", help=model)
    add("--tuned", type=Path, required=True, metavar="MODEL", help="the same, also in the other layout")
    add("--rank", type=int, default=RANK, help=f"default {RANK}")
    add("--conv-rank", type=int, help="rank of 3x3 convolutions (default: a LoRA without residual blocks)")
    add("--clamp", type=float, metavar="Q", help="cut factors off at a quantile as kohya does (0.99); worse")
    help_text = f"text encoders that differ by no more are left out (default {MIN_DIFF})"
    add("--min-diff", type=float, default=MIN_DIFF, metavar="D", help=help_text)
    add("--save-precision", choices=PRECISIONS, default="float", help="type of the numbers (default float)")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1")
    add("--out", type=Path, required=True, help=".safetensors file to be")
    result_options(parser)


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Make a LoRA of what a tuned checkpoint has learned over its base."""
    from lib_lora.tools.extract import extract

    with bar("extract") as progress:
        outcome = extract(
            arguments.base,
            arguments.tuned,
            arguments.out,
            rank=arguments.rank,
            conv_rank=arguments.conv_rank,
            clamp=arguments.clamp,
            min_diff=arguments.min_diff,
            dtype=dtype_of(arguments.save_precision),
            device=arguments.device,
            overwrite=arguments.force,
            preview=arguments.dry_run,
            progress=progress,
        )
    tell(outcome.to_dict(), str(outcome), as_json=arguments.json)
