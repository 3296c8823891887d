"""What works on this computer, and what to do about what does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import time
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from lib_lora import __version__
from lib_lora.compile.requirements import find_compiler, missing_for_inductor
from lib_lora.compile.tensorrt_package import installed_version, why_unusable
from lib_lora.hosts.standalone.vocabulary import find_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGES = ("torch", "safetensors", "diffusers", "transformers", "accelerate", "numpy", "pillow")
MATRIX = 512
REPEATS = 3
SLOW = 0.8


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        topic: Such as ``CPU fp16``.
        value: What was found.
        advice: What to do, or ``""``.
    """

    topic: str
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at versions, devices, number formats, ways to compile and data files; takes a few seconds."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _devices, _formats, _backends, _vocabulary)
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    yield Finding("Prefuse", __version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from map(_version, PACKAGES)


def _version(package: str) -> Finding:
    try:
        return Finding(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, "missing", f"pip install {package}")


def _devices() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("RAM", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    yield Finding("device cpu", f"{torch.get_num_threads()} threads")
    for number in range(torch.cuda.device_count()):
        name, size = torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory
        yield Finding(f"device cuda:{number}", f"{name}, {size / 1e9:.1f} GB")
    if torch.backends.mps.is_available():
        yield Finding("device mps", "available")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        advice = "with an NVIDIA or AMD card, install a torch built for it into .venv; run.py leaves it alone"
        yield Finding("GPU", "none that this torch can use", advice)


def _formats() -> Iterator[Finding]:
    """Half formats on the CPU by measurement: what a processor claims says little about what torch makes of it."""
    reference = _product_seconds(torch.float32)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        speed = reference / _product_seconds(dtype)
        advice = f"models run slower on this CPU in {name} than in fp32; use it for memory only" if speed < SLOW else ""
        yield Finding(f"CPU {name}", f"matrix products at {speed:.2f} x the speed of fp32", advice)


def _product_seconds(dtype: torch.dtype) -> float:
    """Best time of a product of two (512, 512) matrices."""
    matrix = torch.ones(MATRIX, MATRIX, dtype=dtype)
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return min(times)


def _backends() -> Iterator[Finding]:
    """What can be given to ``--compile`` here."""
    compiler = find_compiler()
    yield Finding("C++ compiler", compiler or "none found", "" if compiler else "merges and pictures do not need one")
    if torch.cuda.is_available():
        yield _import_finding("triton", "pip install triton; torch.compile on a GPU needs it")
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        missing = missing_for_inductor(device)
        yield Finding(f"inductor on {device}", "not usable" if missing else "usable", " ".join(missing))
    yield _tensorrt()


def _import_finding(module: str, advice: str) -> Finding:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return Finding(module, "not installed", advice)
    except Exception as error:  # noqa: BLE001 -- a broken build can raise anything when it loads its libraries
        return Finding(module, f"installed, but broken: {type(error).__name__}: {error}", f"reinstall {module}")
    return _version(module)


def _tensorrt() -> Finding:
    """Without a GPU the package is not imported, for that only fails."""
    problem = why_unusable()
    version = installed_version()
    with_version = f" (torch_tensorrt {version})" if version else ""
    return Finding("tensorrt", f"{'not usable' if problem else 'usable'}{with_version}", problem)


def _vocabulary() -> Iterator[Finding]:
    path = find_vocabulary()
    advice = "" if path else "pip install --no-deps open_clip_torch, or give --tokenizer with a model file"
    yield Finding("CLIP vocabulary", str(path or "not found"), advice)
