"""Classes of diffusers and transformers by name: imported when they are needed, and untyped, as these libraries are."""

from __future__ import annotations

import importlib
from typing import Any


def diffusers_class(name: str) -> Any:
    """Such as ``UNet2DConditionModel``."""
    return getattr(importlib.import_module("diffusers"), name)


def transformers_class(name: str) -> Any:
    """Such as ``CLIPTextModel``."""
    return getattr(importlib.import_module("transformers"), name)
