"""Classes of diffusers and transformers by name: imported when they are needed, and untyped, as these libraries are.

And which of these libraries a training lacks here: the WebUI brings some of them, in versions that must stay.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

from lib_lora.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

DTYPE_RENAMED = (0, 40)
TO_TRAIN = {"diffusers": (0, 31), "transformers": (4, 30), "accelerate": (0, 21)}
"""Library → the oldest version that a training runs on."""
SIGLIP = (4, 37)
"""Version of transformers that brought what later versions of diffusers import."""
BEFORE_SIGLIP = "diffusers==0.31.0"
"""The last one that does without."""


def diffusers_class(name: str) -> Any:
    """Such as ``UNet2DConditionModel``.

    Raises:
        ModelError: If diffusers does not go with the other libraries that are installed.
    """
    try:
        return getattr(importlib.import_module("diffusers"), name)
    except RuntimeError as error:  # what its lazy imports raise
        reason = str(error).strip().splitlines()[-1]
        command = install_command(["diffusers"])
        raise ModelError(
            f"diffusers does not go with other libraries here: {reason}; install with: {command}"
        ) from error


def missing_to_train() -> list[str]:
    """What is not installed of `TO_TRAIN`, or is too old."""
    return [name for name, oldest in TO_TRAIN.items() if _version(name) < oldest]


def install_command(names: Sequence[str]) -> str:
    """What installs libraries beside those that are there, and changes none of them."""
    is_old = () < _version("transformers") < SIGLIP
    least = {name: f'"{name}>={".".join(map(str, oldest))}"' for name, oldest in TO_TRAIN.items()}
    wanted = [BEFORE_SIGLIP if name == "diffusers" and is_old else least[name] for name in names]
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return " ".join([python, "-m pip install", *wanted])


def transformers_class(name: str) -> Any:
    """Such as ``CLIPTextModel``."""
    return getattr(importlib.import_module("transformers"), name)


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword that tells diffusers a dtype: ``torch_dtype`` before version 0.40, ``dtype`` since."""
    return {"dtype" if _version("diffusers") >= DTYPE_RENAMED else "torch_dtype": dtype}


def hide_loading_bars() -> None:
    """No bars for the parts of a model; they take seconds, and a command's own bar says more."""
    for library in ("diffusers", "transformers"):
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()


def _version(name: str) -> tuple[int, ...]:
    """The first two numbers; none if it is not installed."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ()
