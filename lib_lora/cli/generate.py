"""``generate``: a prompt with tags becomes a picture."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.cli.output import tell
from lib_lora.errors import ModelError, RequestError

if TYPE_CHECKING:
    import argparse

    from lib_lora.hosts.standalone.loading import LoadedModel
    from lib_lora.session import LoraSession

OUTPUTS = Path("outputs")
LORAS = Path("loras")
SEEDS = 2**32


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
    from lib_lora.hosts.standalone.generate import GenerateRequest, generate
    from lib_lora.hosts.standalone.infotext import png_bytes

    seed = secrets.randbelow(SEEDS) if arguments.seed == -1 else arguments.seed
    names = ("prompt", "negative", "steps", "cfg", "width", "height", "sampler")
    request = GenerateRequest(seed=seed, **{name: getattr(arguments, name) for name in names})
    request.check()
    out = arguments.out or _next_free(OUTPUTS, seed)
    if out.exists() and not arguments.force:
        raise RequestError(f"{out} exists; choose another --out, or --force to replace it.")
    loaded, session = _load(arguments)
    start = time.perf_counter()
    picture = generate(loaded, session, request, progress=sys.stderr.isatty())[0]
    seconds = time.perf_counter() - start
    out.parent.mkdir(parents=True, exist_ok=True)
    save_bytes(out, png_bytes(picture.image, picture.infotext), overwrite=arguments.force)
    data = {"out": str(out), "seconds": seconds, "notes": loaded.notes, "infotext": str(picture.infotext)}
    data |= {"parameters": dict(picture.infotext.parameters), "report": picture.report.to_dict()}
    lines = (*loaded.notes, str(picture.report), f"{out} in {seconds:.1f} s")
    tell(data, "\n".join(lines), as_json=arguments.json)


def _load(arguments: argparse.Namespace) -> tuple[LoadedModel, LoraSession]:
    """The model, and a session that looks into the LoRA folders."""
    import torch

    from lib_lora.hosts.standalone.demo import LORA_DIR
    from lib_lora.hosts.standalone.loading import DEMO, DEMO_THREADS, load_pipeline
    from lib_lora.session import LoraSession

    folders = arguments.lora_dir or [LORAS, *([LORA_DIR] if arguments.model == DEMO else [])]
    missing = [folder for folder in arguments.lora_dir or () if not folder.is_dir()]
    if missing:
        raise ModelError(f"There is no LoRA folder {missing[0]}.")
    if arguments.model == DEMO:
        torch.set_num_threads(DEMO_THREADS)
    options = {"tokenizer": arguments.tokenizer, "prediction": arguments.prediction}
    loaded = load_pipeline(arguments.model, arguments.device, arguments.dtype, **options)
    found = [folder for folder in folders if folder.is_dir()]
    session = LoraSession.for_pipeline(loaded.pipe, found, mode=arguments.mode, checkpoint=loaded.files or None)
    return loaded, session


def _next_free(folder: Path, seed: int) -> Path:
    """``00000-SEED.png`` with the first number above all that are there, as the WebUI counts."""
    numbers = [int(file.name[:5]) for file in folder.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")]
    return folder / f"{max(numbers, default=-1) + 1:05d}-{seed}.png"
