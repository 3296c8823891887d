"""``convert-pickle``: a pickle becomes .safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help=".pt, .ckpt or .bin file")
    parser.add_argument("--out", type=Path, help=".safetensors file (default: beside SOURCE)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Turn a pickle into .safetensors without running what may be in it."""
    from lib_lora.core.pickles import convert_pickle
    from lib_lora.hosts.standalone.loading import CONVERT_SECONDS

    out = arguments.out or arguments.source.with_suffix(".safetensors")
    convert_pickle(arguments.source, out, overwrite=arguments.force, timeout_s=CONVERT_SECONDS)
    print(out)
