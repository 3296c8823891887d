"""``generate``: a prompt with tags becomes a picture."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import bar, tell
from lib_lora.errors import RequestError

if TYPE_CHECKING:
    import argparse

    from lib_lora.hosts.standalone.loading import LoadedModel
    from lib_lora.session import LoraSession


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    add("--prompt", required=True, help="text with <lora:name:strength> tags")
    add("--negative", default="", help="negative prompt")
    add("--model", default="demo", help="demo, a diffusers folder, or a .safetensors or .ckpt file of SD1, SD2 or SDXL")
    add("--lora-dir", type=Path, action="append", help="folder of LoRA files; may be repeated (default: ./loras)")
    add("--steps", type=int, default=20)
    add("--cfg", type=float, default=7.0, help="guidance scale (default: 7)")
    add("--seed", type=int, default=-1, help="-1 for a random one (default)")
    add("--width", type=int, help="in pixels (default: the model's own)")
    add("--height", type=int, help="in pixels (default: the model's own)")
    add("--sampler", default="Euler a", help="the WebUI's name (default: Euler a)")
    add("--mode", choices=("prefuse", "hook"), default="prefuse", help="into the weights, or beside them")
    add("--compile", choices=("off", "inductor", "tensorrt"), default="off", help="in the background; eager till then")
    add("--controlnet", type=Path, action="append", help="ControlNet: a diffusers folder or a file; may be repeated")
    add("--control-image", type=Path, action="append", help="what it reads (edges, depths, …); one for each ControlNet")
    add("--control-scale", type=float, action="append", help="how much it counts (default: 1); one, or one for each")
    add("--control-follows", action="store_true", help="LoRAs of the UNet act on the ControlNets' copy of it too")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    add("--prediction", choices=("auto", "epsilon", "v"), default="auto", help="what an SD2 file's UNet predicts")
    add("--tokenizer", type=Path, help="folder or file with CLIP's vocabulary, for a model file")
    add("--out", type=Path, help="PNG file (default: the next free number in outputs)")
    add("--force", action="store_true", help="replace an existing file")
    add("--json", action="store_true")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Make a picture from a prompt with LoRA tags."""
    from lib_lora.core.saving import save_bytes
    from lib_lora.hosts.host import SEEDS, GenerateRequest
    from lib_lora.hosts.standalone.controls import read_controls
    from lib_lora.hosts.standalone.generate import generate
    from lib_lora.hosts.standalone.host import OUTPUTS, next_free
    from lib_lora.hosts.standalone.infotext import png_bytes

    seed = secrets.randbelow(SEEDS) if arguments.seed == -1 else arguments.seed
    names = ("prompt", "negative", "steps", "cfg", "width", "height", "sampler")
    images, scales = arguments.control_image or (), arguments.control_scale or ()
    controls = read_controls(images, scales, len(arguments.controlnet or ()))
    request = GenerateRequest(seed=seed, controls=controls, **{name: getattr(arguments, name) for name in names})
    request.check()
    out = arguments.out or next_free(OUTPUTS, seed)
    if out.exists() and not arguments.force:
        raise RequestError(f"{out} exists; choose another --out, or --force to replace it.")
    loaded, session = _load(arguments)
    start = time.perf_counter()
    try:
        with bar("drawing", "step") as progress:
            picture = generate(loaded, session, request, progress=progress)[0]
        status = loaded.handle.status
    finally:
        loaded.handle.release()
    seconds = time.perf_counter() - start
    out.parent.mkdir(parents=True, exist_ok=True)
    save_bytes(out, png_bytes(picture.image, picture.infotext), overwrite=arguments.force)
    data = {"out": str(out), "seconds": seconds, "notes": loaded.notes, "infotext": str(picture.infotext)}
    data |= {"parameters": dict(picture.infotext.parameters), "report": picture.report.to_dict()}
    data |= {"compile": status.to_dict()}
    lines = [*loaded.notes, str(picture.report), *([str(status)] if arguments.compile != "off" else [])]
    lines.append(f"{out} in {seconds:.1f} s")
    tell(data, "\n".join(lines), as_json=arguments.json)


def _load(arguments: argparse.Namespace) -> tuple[LoadedModel, LoraSession]:
    """The model, and a session that looks into the LoRA folders."""
    from lib_lora.catalog import LoraCatalog
    from lib_lora.hosts.standalone.host import found_folders, open_session

    catalog = LoraCatalog(found_folders(arguments.lora_dir or (), arguments.model))
    names = ("device", "dtype", "mode", "control_follows")
    options = {name: getattr(arguments, name) for name in names} | {"compiler": arguments.compile}
    options |= {"controlnets": arguments.controlnet or ()}
    loading = {"tokenizer": arguments.tokenizer, "prediction": arguments.prediction}
    return open_session(arguments.model, catalog, loading=loading, **options)
