"""``convert``: a LoRA or a model in another layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lora.cli.output import bar, result_options, tell
from lib_lora.errors import JobError

if TYPE_CHECKING:
    import argparse

    from lib_lora.tools.outcome import Outcome

FAMILIES = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
LORA_LAYOUTS, MODEL_LAYOUTS = ("kohya", "peft"), ("single", "diffusers")


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--lora", type=Path, metavar="FILE", help="to kohya or peft")
    source.add_argument("--model", type=Path, metavar="PATH", help="file or folder, to single or diffusers")
    add("--to", choices=(*LORA_LAYOUTS, *MODEL_LAYOUTS), required=True, help="peft: as diffusers saves LoRAs")
    add("--family", choices=FAMILIES, help="what a LoRA is for (default: found out)")
    add("--variant", help="which weights of a folder, such as fp16 (default: those without a variant)")
    add("--config", type=Path, help="folder of configurations, for a model file of another size than its family's")
    add("--tokenizer", type=Path, help="folder or file with CLIP's vocabulary, for a folder to be")
    add("--prediction", choices=("epsilon", "v"), help="what a model file's UNet predicts (default: found out)")
    add("--out", type=Path, required=True, help="file, or folder, to be")
    result_options(parser)


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Write a LoRA in kohya's or PEFT's layout, or a model as one file or as a folder of diffusers."""
    if arguments.to not in (LORA_LAYOUTS if arguments.lora else MODEL_LAYOUTS):
        kind, layouts = ("LoRA", LORA_LAYOUTS) if arguments.lora else ("model", MODEL_LAYOUTS)
        raise JobError(f"a {kind} can be converted to {' or '.join(layouts)}, not to {arguments.to}")
    options = {"preview": arguments.dry_run}
    with bar("writing") as progress:
        made = (_lora if arguments.lora else _model)(arguments, options | {"progress": progress})
    tell(made.to_dict(), str(made), as_json=arguments.json)


def _lora(arguments: argparse.Namespace, options: dict[str, Any]) -> Outcome:
    from lib_lora.core.models import BaseModel
    from lib_lora.tools.convert import convert_lora

    family = BaseModel[FAMILIES[arguments.family]] if arguments.family else None
    own = {"family": family, "overwrite": arguments.force}
    return convert_lora(arguments.lora, arguments.to, arguments.out, **own, **options)


def _model(arguments: argparse.Namespace, options: dict[str, Any]) -> Outcome:
    from lib_lora.hosts.standalone.vocabulary import tokenizer_files
    from lib_lora.tools.convert_checkpoint import to_diffusers, to_single

    if arguments.to == "single":
        own = {"variant": arguments.variant, "overwrite": arguments.force}
        return to_single(arguments.model, arguments.out, **own, **options)
    own = {"config": arguments.config, "prediction": arguments.prediction}
    own["tokenizer"] = partial(tokenizer_files, arguments.tokenizer)
    return to_diffusers(arguments.model, arguments.out, **own, **options)
