"""``convert``: a LoRA or a model in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import bar, tell

if TYPE_CHECKING:
    import argparse

FAMILIES = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    add("--lora", type=Path, required=True, metavar="FILE")
    add("--to", choices=("kohya", "peft"), required=True, help="peft: as diffusers saves LoRAs")
    add("--family", choices=FAMILIES, help="what a LoRA is for (default: found out)")
    add("--out", type=Path, required=True)
    add("--force", action="store_true", help="replace an existing file")
    add("--json", action="store_true")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Write a LoRA file in the layout of kohya or of PEFT and diffusers."""
    from lib_lora.core.models import BaseModel
    from lib_lora.tools.convert import convert_lora

    family = BaseModel[FAMILIES[arguments.family]] if arguments.family else None
    with bar("writing") as progress:
        options = {"family": family, "overwrite": arguments.force, "progress": progress}
        made = convert_lora(arguments.lora, arguments.to, arguments.out, **options)
    text = f"{made.path}: {made.layers} layers for {made.base_model} in {made.layout}'s layout"
    tell(made.to_dict(), text, as_json=arguments.json)
