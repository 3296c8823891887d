"""``combine``: several LoRAs become one."""

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
    lora = "LoRA file with strengths, which may be negative, and arguments of a tag (lbw=, dyn=); may be repeated"
    add("--lora", action="append", required=True, metavar="FILE[:STRENGTH[:UNET]][:key=value…]", help=lora)
    methods = "concat: the exact sum, ranks add up (default); svd: its best approximation; add: kohya's merge_lora"
    add("--method", choices=("concat", "svd", "add"), default="concat", help=methods)
    add("--rank", type=int, help="for svd: of each layer")
    add("--conv-rank", type=int, help="for svd: of 3x3 convolutions (default: as --rank)")
    save_precision(parser)
    add("--out", type=Path, required=True, metavar="FILE", help=".safetensors file")
    result_options(parser)


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Make one LoRA that does what several do together."""
    from lib_lora.errors import JobError
    from lib_lora.tools.combine import combine
    from lib_lora.tools.given import given_files
    from lib_lora.tools.ranks import RankRule

    rank, conv_rank = arguments.rank, arguments.conv_rank
    if rank is None and (conv_rank is not None or arguments.method == "svd"):
        raise JobError("--method svd needs a --rank")
    rule = None if rank is None else RankRule(rank, conv_rank)
    loras, dtype = given_files(arguments.lora), dtype_of(arguments.save_precision)
    with bar("combine") as progress:
        outcome = combine(
            loras,
            arguments.out,
            method=arguments.method,
            rule=rule,
            dtype=dtype,
            overwrite=arguments.force,
            preview=arguments.dry_run,
            progress=progress,
        )
    tell(outcome.to_dict(), str(outcome), as_json=arguments.json)
