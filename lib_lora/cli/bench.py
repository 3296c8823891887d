"""``bench``: the README's tables on this computer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.errors import RequestError

if TYPE_CHECKING:
    import argparse

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SUITES = (
    *("steps", "switch", "schedules", "families", "merge", "resize", "extract", "files"),
    *("compile", "compile_controlnet", "train", "train_demo", "train_memory", "page"),
)
GPU_SUITES = ("gpu", "gpu_switch", "gpu_compile")


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--suite", choices=(*SUITES, *GPU_SUITES), help="one of them (default: all); further options go to the suite"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Measure on this computer what the README claims."""
    if not BENCHMARKS.is_dir():
        raise RequestError(f"{BENCHMARKS} is missing; the benchmarks are in the repository, not in the package.")
    sys.path.insert(0, str(BENCHMARKS.parent))
    suites = (arguments.suite,) if arguments.suite else SUITES
    return max(importlib.import_module(f"{BENCHMARKS.name}.{suite}").main(rest) or 0 for suite in suites)
