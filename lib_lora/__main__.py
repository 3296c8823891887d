"""The command line: ``python -m lib_lora COMMAND``. Exit codes: 0 done, 1 refused, 2 wrong usage."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING

from lib_lora import __version__
from lib_lora.cli import (
    bench,
    combine,
    convert,
    convert_pickle,
    demo,
    doctor,
    export,
    extract,
    generate,
    inspect,
    merge,
    metadata,
    resize,
    resize_images,
    serve,
    split_dylora,
    train,
)
from lib_lora.errors import PrefuseError

if TYPE_CHECKING:
    from collections.abc import Sequence

# What diffusers and transformers say about themselves is not for users of a command line.
QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
INTERRUPTED = 130
READ_MORE = (bench.run, train.run)
"""Commands that understand options of their own."""

COMMANDS = MappingProxyType(
    {
        "demo": demo,
        "generate": generate,
        "serve": serve,
        "inspect": inspect,
        "merge": merge,
        "extract": extract,
        "combine": combine,
        "resize": resize,
        "resize-images": resize_images,
        "split-dylora": split_dylora,
        "train": train,
        "export": export,
        "convert": convert,
        "metadata": metadata,
        "bench": bench,
        "doctor": doctor,
        "convert-pickle": convert_pickle,
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and arguments.run not in READ_MORE:
        _parser().error(f"unknown options: {' '.join(rest)}")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return _run(arguments, rest)
    except PrefuseError as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who read has enough, as `head` has; Python would complain of the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        logging.getLogger("lib_lora").exception("unexpected")
        print(f"This is a fault of Prefuse, please report it: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


def _run(arguments: argparse.Namespace, rest: list[str]) -> int:
    code: int | None = arguments.run(arguments, rest)
    sys.stdout.flush()
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lib_lora", description="Any number of LoRAs at the step time of none.")
    parser.add_argument("--version", action="version", version=f"Prefuse {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = (command.run.__doc__ or "").strip().splitlines()[0]
        own = commands.add_parser(name, help=text, description=text)
        own.set_defaults(run=command.run)
        command.options(own)
    return parser


if __name__ == "__main__":
    sys.exit(main())
