"""What the Train tab needs in a WebUI's data folder: pictures, and configurations as small as the checkpoints there."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from lib_lora.core.single_file import CONFIGS
from tests.webui_real.make_models import CONTEXT, clip_config

if TYPE_CHECKING:
    from pathlib import Path

MISSING = (
    "a training in the WebUI did not run: set TRAINING_ROOT to a folder made with "
    "pip install --no-deps --target FOLDER diffusers==0.31.0 importlib_metadata zipp"
)
PICTURES = "circles"
COLOURS = ("red", "green", "blue", "yellow")
SIDE = 64
CONFIGS_SCRIPT = '''\
"""Prefuse takes each SD1 checkpoint to be of the usual size; here it is as small as the tests' checkpoints."""

from pathlib import Path

from lib_lora.hosts.standalone import checkpoints

checkpoints.CONFIGS = Path({folder!r})
'''


def make_training(data: Path, channels: int = 32) -> None:
    """Write all of it.

    Args:
        data: The data folder, with the checkpoints of `make_models`.
        channels: Of these.
    """
    folder = data / "configs"
    shutil.copytree(CONFIGS, folder)
    widths = [channels * factor for factor in (1, 2, 4, 4)]
    _change(folder / "sd1/unet/config.json", block_out_channels=widths, cross_attention_dim=CONTEXT)
    _change(folder / "sd1/vae/config.json", block_out_channels=[32] * 4)
    _change(folder / "sd1/text_encoder/config.json", **clip_config())
    script = data / "extensions/small-training/scripts/small_training.py"
    script.parent.mkdir(parents=True)
    script.write_text(CONFIGS_SCRIPT.format(folder=str(folder)), encoding="utf-8")
    _draw(data / "models/train" / PICTURES / "5_circles")


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def _draw(folder: Path) -> None:
    folder.mkdir(parents=True)
    for index, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        ImageDraw.Draw(picture).ellipse((10, 10, 54, 54), fill=colour)
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} circle", encoding="utf-8")
