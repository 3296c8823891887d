"""What torch.compile needs of a computer, looked at before it fails in the middle of a picture."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lib_lora.compile.inductor import FROZEN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CPP_COMPILERS = ("g++", "c++", "clang++", "cl")
C_COMPILERS = ("gcc", "cc", "clang", "cl")
INSTALL_COMPILER = {
    "Linux": "install g++ (apt install g++)",
    "Darwin": "run xcode-select --install",
    "Windows": "install Visual Studio's Build Tools and start from their prompt",
}
LEAST_CAPABILITY = (7, 0)
"""Of GPUs that triton makes code for."""


def find_compiler(names: Sequence[str] = CPP_COMPILERS, variable: str = "CXX") -> str | None:
    """A compiler's path: what a variable of the environment names, or the first that is found."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get(variable), *names)))), None)


def missing_for_inductor(device: str) -> list[str]:
    """What is missing for torch.compile on ``cpu`` or ``cuda``, and what to do: sentences, none if it can be used."""
    return [*_settings(), *(_on_gpu() if device == "cuda" else _on_cpu()), *_headers()]


def _settings() -> Iterator[str]:
    from torch._dynamo.eval_frame import is_dynamo_supported
    from torch._inductor import config

    if not is_dynamo_supported():
        yield f"torch {torch.__version__} can not compile on Python {platform.python_version()}; install a newer torch."
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        yield "TORCHDYNAMO_DISABLE=1 switches it off; remove that from the environment."
    if config.freezing:
        yield f"{FROZEN}."


def _on_cpu() -> Iterator[str]:
    if not find_compiler():
        yield f"There is no C++ compiler: {INSTALL_COMPILER.get(platform.system(), 'install one')}."


def _on_gpu() -> Iterator[str]:
    if importlib.util.find_spec("triton") is None:
        windows = platform.system() == "Windows"
        yield f"triton is not installed: pip install {'triton-windows' if windows else 'triton'}."
    if not find_compiler(C_COMPILERS, "CC"):
        yield f"There is no C compiler, which triton needs: {INSTALL_COMPILER.get(platform.system(), 'install one')}."
    old = [gpu for gpu in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(gpu) < LEAST_CAPABILITY]
    if old and not torch.version.hip:
        least = ".".join(map(str, LEAST_CAPABILITY))
        yield f"cuda:{old[0]} is older than compute capability {least}, the least that triton makes code for."


def _headers() -> Iterator[str]:
    """Compiled code is a module of Python's, so its headers are needed."""
    if platform.system() == "Linux" and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        version = ".".join(platform.python_version_tuple()[:2])
        yield f"Python's headers are missing: apt install python{version}-dev."
