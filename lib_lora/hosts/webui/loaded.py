"""What the WebUI was started with and has loaded."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import Any

from modules import shared


def lora_folders() -> list[str]:
    """Where the built-in extension looks for LoRAs; in that order, so the later folder wins."""
    named = (getattr(shared.cmd_opts, name, None) for name in ("lora_dir", "lyco_dir_backcompat"))
    return [folder for folder in named if folder]


def checkpoint_file(sd_model: Any) -> str:
    """Path of the checkpoint whose weights the model has, or ``""``."""
    return getattr(getattr(sd_model, "sd_checkpoint_info", None), "filename", "") or ""
