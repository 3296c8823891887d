"""Classes of diffusers and transformers by name: imported when they are needed, and untyped, as these libraries are."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPE_RENAMED = (0, 40)


def diffusers_class(name: str) -> Any:
    """Such as ``UNet2DConditionModel``."""
    return getattr(importlib.import_module("diffusers"), name)


def transformers_class(name: str) -> Any:
    """Such as ``CLIPTextModel``."""
    return getattr(importlib.import_module("transformers"), name)


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword that tells diffusers a dtype: ``torch_dtype`` before version 0.40, ``dtype`` since."""
    version = tuple(int(part) for part in importlib.metadata.version("diffusers").split(".")[:2])
    return {"dtype" if version >= DTYPE_RENAMED else "torch_dtype": dtype}


def hide_loading_bars() -> None:
    """No bars for the parts of a model; they take seconds, and a command's own bar says more."""
    for library in ("diffusers", "transformers"):
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
