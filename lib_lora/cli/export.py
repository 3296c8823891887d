"""``export``: a UNet as a file that other programs run."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import bar, tell
from lib_lora.errors import JobError, TagError

if TYPE_CHECKING:
    from lib_lora.catalog import LoraCatalog
    from lib_lora.hosts.standalone.loading import LoadedModel
    from lib_lora.prompt.tags import ParsedPrompt
    from lib_lora.report import SessionReport

FORMATS = ("torchscript", "exported-program", "onnx")
INPUTS = """inputs, by name, for B pictures of H x W pixels:
  latent       (B, 4, H/8, W/8); 9 channels for an inpainting model
  timestep     (B), float32, 0 to 999
  context      (B, 77, C): what the text encoders made of the prompt; C is 768 for SD1, 1024 for SD2, 2048 for SDXL
  text_embeds  (B, 1280), SDXL: the pooled prompt
  time_ids     (B, 6), SDXL: original height, width, crop top, left, aimed height, width
  down         --controlnet: list of residuals, 12 for SD1 and SD2, 9 for SDXL (in ONNX down_0, down_1 …)
  mid          --controlnet: residual of the middle block
output: the prediction, in the shape of the latent. Numbers are in --dtype but for the timestep.
docs/export.md tells how such a file is loaded, and how LoRAs are switched in it."""


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = INPUTS
    add = parser.add_argument
    add("--model", default="demo", help="demo, a diffusers folder, or a .safetensors or .ckpt file of SD1, SD2 or SDXL")
    add("--format", choices=FORMATS, required=True)
    loras = parser.add_mutually_exclusive_group()
    loras.add_argument("--prompt", help="tags such as <lora:ink:0.8>, looked up in --lora-dir: in the weights")
    loras.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:TE[:UNET]][:KEY=VALUE…]",
        help="a LoRA file, its strengths and a tag's other arguments; may be repeated",
    )
    add("--lora-dir", type=Path, action="append", help="folder of LoRA files; may be repeated (default: ./loras)")
    add("--swappable", action="store_true", help="keep each weight apart under its name, so that it can be replaced")
    add("--controlnet", action="store_true", help="with inputs for a ControlNet's residuals")
    add("--width", type=int, help="in pixels (default: the model's own)")
    add("--height", type=int, help="in pixels (default: the model's own)")
    add("--batch", type=int, default=1, help="latents in one call (default: 1; 2 for guidance in one call)")
    add("--dynamic", action="store_true", help="take other sizes, batches and longer prompts too")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    add("--prediction", choices=("auto", "epsilon", "v"), default="auto", help="what an SD2 file's UNet predicts")
    add("--tokenizer", type=Path, help="folder or file with CLIP's vocabulary, for a model file")
    add("--out", type=Path, required=True, help="file to be; for onnx a folder to be, if it has no suffix")
    add("--force", action="store_true", help="replace an existing file")
    add("--json", action="store_true")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Write a UNet, with LoRAs in it, as TorchScript, an exported program or ONNX."""
    from lib_lora.compile.export import check_export, export_unet
    from lib_lora.compile.unet_inputs import UNetSize

    check_export(arguments.format, arguments.out, overwrite=arguments.force)
    loaded, applied = _load(arguments)
    size = UNetSize(arguments.batch, arguments.height or loaded.size, arguments.width or loaded.size)
    names = ("controlnet", "dynamic", "swappable")
    with bar("exporting", "stage") as progress:
        report = export_unet(
            loaded.pipe.unet,
            arguments.format,
            arguments.out,
            size,
            overwrite=arguments.force,
            progress=progress,
            **{name: getattr(arguments, name) for name in names},
        )
    loras = applied.applied if applied else ()
    lines = (*loaded.notes, *(f"+ {lora}" for lora in loras), str(report))
    data = {**report.to_dict(), "model": loaded.name, "loras": applied.to_dict()["applied"] if applied else []}
    tell(data, "\n".join(lines), as_json=arguments.json)


def _load(arguments: argparse.Namespace) -> tuple[LoadedModel, SessionReport | None]:
    """The model with the LoRAs in it, and what they did.

    Raises:
        JobError: If a LoRA can not be applied, or one moves while a picture is made.
    """
    from lib_lora.hosts.standalone.host import open_session

    catalog, parsed = _asked(arguments)
    loading = {"tokenizer": arguments.tokenizer, "prediction": arguments.prediction}
    loaded, session = open_session(
        arguments.model, catalog, device=arguments.device, dtype=arguments.dtype, loading=loading
    )
    if parsed is None:
        return loaded, None
    report = session.set(parsed)
    if report.refused:
        raise JobError(f"Nothing was exported: {report.refused[0].reason}")
    moving = [lora.name for lora in report.applied if lora.schedule]
    if moving:
        raise JobError(f"{moving[0]} moves while a picture is made; weights in a file do not, so give it one strength.")
    return loaded, report


def _asked(arguments: argparse.Namespace) -> tuple[LoraCatalog, ParsedPrompt | None]:
    """Where LoRAs are looked up, and what is asked for; None for no LoRAs."""
    from lib_lora.catalog import LoraCatalog
    from lib_lora.hosts.standalone.host import found_folders
    from lib_lora.prompt.tags import ParsedPrompt, parse_prompt
    from lib_lora.tools.given import given_files

    if arguments.lora:
        given = given_files(arguments.lora)
        catalog = LoraCatalog({lora.entry.path.resolve().parent for lora in given})
        requests = (replace(lora.request, name=catalog.tag_name(lora.entry.path)) for lora in given)
        return catalog, ParsedPrompt("", tuple(requests))
    catalog = LoraCatalog(found_folders(arguments.lora_dir or (), arguments.model))
    if not arguments.prompt:
        return catalog, None
    parsed = parse_prompt(arguments.prompt)
    if parsed.problems:
        raise TagError(parsed.problems[0].message)
    if not parsed.requests:
        raise JobError("the prompt names no LoRA; write <lora:NAME:0.8>")
    return catalog, parsed
