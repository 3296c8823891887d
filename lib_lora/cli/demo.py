"""``demo``: the embedded model with and without LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

OUT = Path("outputs") / "demo.png"


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--out", type=Path, default=OUT, help="PNG file (default: outputs/demo.png)")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Draw the embedded model's pictures with and without LoRAs and measure what the LoRAs cost."""
    from lib_lora.hosts.standalone.demo_run import run_demo

    run_demo(arguments.out, lambda line: print(line, flush=True))
