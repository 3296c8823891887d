"""``merge``: LoRAs become part of a checkpoint."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import bar, result_options, tell
from lib_lora.cli.precision import PRECISIONS
from lib_lora.errors import ModelError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator

    from lib_lora.tools.given import GivenLora


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    add("--model", type=Path, required=True, help=".safetensors or .ckpt file, or diffusers folder")
    loras = parser.add_mutually_exclusive_group(required=True)
    loras.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:TE[:UNET]][:KEY=VALUE…]",
        help="a LoRA file, its strengths and a tag's other arguments; may be repeated",
    )
    loras.add_argument("--prompt", help="tags such as <lora:ink:0.8:lbw=MIDD>, looked up in --lora-dir")
    add("--lora-dir", type=Path, action="append", help="may be repeated (default: loras)")
    add("--out", type=Path, required=True, help="file, or folder, to be")
    add("--precision", choices=PRECISIONS, default="float", help="of the calculation; fp16 and bf16 round as kohya's")
    add("--save-precision", choices=PRECISIONS, help="of the weights (default: as in the model)")
    add("--device", default="cpu", help="where to calculate: cpu, cuda, cuda:1, mps")
    add("--hash", action="store_true", help="put the model's SHA-256 into the recipe; it is read once more for that")
    result_options(parser)


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Merge LoRAs into a checkpoint, as the prompt would have fused them."""
    # Between two products torch's threads have to wait for one that copies; by default they would spin meanwhile.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _collector_off():
        from lib_lora.presets import PresetFiles
        from lib_lora.tools.merge import merge_loras

    with bar("merging") as progress:
        report = merge_loras(
            arguments.model,
            _loras(arguments),
            arguments.out,
            precision=arguments.precision,
            save_precision=arguments.save_precision,
            device=arguments.device,
            presets=PresetFiles(_folders(arguments)) if arguments.prompt else None,
            hashed=arguments.hash,
            overwrite=arguments.force,
            preview=arguments.dry_run,
            progress=progress,
        )
    tell(report.to_dict(), str(report), as_json=arguments.json)


@contextmanager
def _collector_off() -> Generator[None]:
    """What libraries make stays; to look for garbage in it, again and again, is a sixth of the time they load."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _loras(arguments: argparse.Namespace) -> list[GivenLora]:
    from lib_lora.catalog import LoraCatalog
    from lib_lora.tools.given import given_files, prompted_loras

    if arguments.lora:
        return given_files(arguments.lora)
    folders = _folders(arguments)
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise ModelError(f"There is no LoRA folder {missing[0]}.")
    return prompted_loras(arguments.prompt, LoraCatalog(folders))


def _folders(arguments: argparse.Namespace) -> list[Path]:
    return arguments.lora_dir or [Path("loras")]
