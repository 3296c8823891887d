"""The command line: ``python -m lib_lora COMMAND``. Exit codes: 0 done, 1 refused, 2 wrong usage."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import secrets
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lora import __version__
from lib_lora.errors import ModelError, PrefuseError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lib_lora.hosts.standalone.loading import LoadedModel
    from lib_lora.session import LoraSession
    from lib_lora.tools.inspect import Fit, Inspection

# What diffusers and transformers say about themselves is not for users of a command line.
QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SUITES = ("steps", "switch", "families")
OUTPUTS = Path("outputs")
LORAS = Path("loras")
SEEDS = 2**32
INTERRUPTED = 130
NAMES_SHOWN = 5
METADATA_SHOWN = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and arguments.run is not _bench:
        _parser().error(f"unknown options: {' '.join(rest)}")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return arguments.run(arguments, rest) or 0
    except PrefuseError as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        logging.getLogger("lib_lora").exception("unexpected")
        print(f"This is a fault of Prefuse, please report it: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lib_lora", description="Any number of LoRAs at the step time of none.")
    parser.add_argument("--version", action="version", version=f"Prefuse {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, add_options in COMMANDS:
        text = (run.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        add_options(command)
    return parser


def _tell(data: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """One result on stdout, for people or for programs."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str) if as_json else text)


def _generate_options(parser: argparse.ArgumentParser) -> None:
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


def _generate(arguments: argparse.Namespace, _: list[str]) -> None:
    """Make a picture from a prompt with LoRA tags."""
    from lib_lora.core.files import save_bytes
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
    _tell(data, "\n".join(lines), as_json=arguments.json)


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


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--model", type=Path, help="checkpoint or diffusers folder to lay the LoRA over")
    parser.add_argument("--json", action="store_true")


def _inspect(arguments: argparse.Namespace, _: list[str]) -> None:
    """Say what a file is: base model, algorithm, ranks, alphas, norms per block, NaN, metadata."""
    from lib_lora.tools.inspect import inspect_file

    inspection = inspect_file(arguments.file, arguments.model)
    _tell(inspection.to_dict(), _inspection_text(inspection), as_json=arguments.json)


def _inspection_text(found: Inspection) -> str:
    rows = {
        "file": f"{found.path}, {found.size / 1e6:.2f} MB, {found.tensors} tensors",
        "kind": f"{found.kind} for {found.base_model or 'an unknown model'}",
        "base model from": found.base_model_from,
        "hash": f"{found.sha256[:12]} (as in infotexts), {found.sha256}",
        "dtypes": _counts(found.dtypes),
        "layouts": _counts(found.layouts),
        "algorithms": _counts(Counter(layer.algorithm for layer in found.layers)),
        "ranks": _counts(Counter(layer.rank for layer in found.layers)),
        "alphas": _counts(Counter(f"{layer.alpha:g}" for layer in found.layers if layer.alpha is not None)),
        "norm by block": ", ".join(f"{block} {norm:.3g}" for block, norm in found.block_norms().items()),
        "share by block": ", ".join(f"{block} {share:.0%}" for block, share in found.block_shares().items()),
        "embeddings": ", ".join(found.embeddings),
        "on the model": _fit_text(found.fit),
        "NaN or infinity": _some(found.not_finite) or "none",
        "unused keys": _some(found.unused),
        "notes": "; ".join(found.notes),
        "problem": found.problem,
    }
    rows |= {f"metadata {key}": textwrap.shorten(value, METADATA_SHOWN) for key, value in found.metadata.items()}
    return "\n".join(f"{key:16} {value}" for key, value in rows.items() if value)


def _fit_text(fit: Fit | None) -> str:
    if fit is None:
        return ""
    missing = "; ".join(f"{part} lacks {count}: {', '.join(first)}" for part, (count, first) in fit.missing.items())
    return fit.problem or f"{fit.matched} of {fit.total} layers exist in this {fit.model} model {missing}".rstrip()


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{key} ({count})" for key, count in counts.items())


def _some(names: Sequence[str]) -> str:
    more = ", …" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)}: {', '.join(names[:NAMES_SHOWN])}{more}" if names else ""


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=SUITES, help="one of them (default: all); further options go to the suite")


def _bench(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Measure on this computer what the README claims."""
    if not BENCHMARKS.is_dir():
        raise RequestError(f"{BENCHMARKS} is missing; the benchmarks are in the repository, not in the package.")
    sys.path.insert(0, str(BENCHMARKS.parent))
    suites = (arguments.suite,) if arguments.suite else SUITES
    return max(importlib.import_module(f"{BENCHMARKS.name}.{suite}").main(rest) or 0 for suite in suites)


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")


def _doctor(arguments: argparse.Namespace, _: list[str]) -> None:
    """Tell versions, devices and what works here, and what to do about the rest."""
    from lib_lora.hosts.standalone.doctor import examine

    findings = examine()
    lines = [f"{found.topic:18} {found.value}{f' → {found.advice}' if found.advice else ''}" for found in findings]
    _tell({"findings": [found._asdict() for found in findings]}, "\n".join(lines), as_json=arguments.json)


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help=".pt, .ckpt or .bin file")
    parser.add_argument("--out", type=Path, help=".safetensors file (default: beside SOURCE)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def _convert(arguments: argparse.Namespace, _: list[str]) -> None:
    """Turn a pickle into .safetensors without running what may be in it."""
    from lib_lora.core.pickles import convert_pickle
    from lib_lora.hosts.standalone.loading import CONVERT_SECONDS

    out = arguments.out or arguments.source.with_suffix(".safetensors")
    convert_pickle(arguments.source, out, overwrite=arguments.force, timeout_s=CONVERT_SECONDS)
    print(out)


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=OUTPUTS / "demo.png", help="PNG file (default: outputs/demo.png)")


def _demo(arguments: argparse.Namespace, _: list[str]) -> None:
    """Draw the embedded model's pictures with and without LoRAs and measure what the LoRAs cost."""
    from lib_lora.hosts.standalone.demo_run import run_demo

    run_demo(arguments.out, lambda line: print(line, flush=True))


COMMANDS: tuple[tuple[str, Callable[..., int | None], Callable[[argparse.ArgumentParser], None]], ...] = (
    ("demo", _demo, _demo_options),
    ("generate", _generate, _generate_options),
    ("inspect", _inspect, _inspect_options),
    ("bench", _bench, _bench_options),
    ("doctor", _doctor, _doctor_options),
    ("convert-pickle", _convert, _convert_options),
)


if __name__ == "__main__":
    sys.exit(main())
