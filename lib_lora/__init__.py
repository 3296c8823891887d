"""Prefuse: any number of LoRAs at the step time of none, switched fast, taken back bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib_lora.session import LoraSession

__version__ = "0.1.0"
__all__ = ["LoraSession", "__version__"]


def __getattr__(name: str) -> Any:
    """`LoraSession`, imported on first use: importing the package alone must not import torch."""
    if name == "LoraSession":
        from lib_lora.session import LoraSession

        return LoraSession
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
