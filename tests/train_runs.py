"""A small model, a few pictures and a training of both, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import make_tiny, write_folder

from lib_lora.train.model import TrainModel
from lib_lora.train.options import TrainOptions
from lib_lora.train.trainer import train

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lib_lora.train.outcome import TrainOutcome

SIDE = 64
WORDS = ("a b c", "d e", "a f", "g", "h i j", "k")


def tiny_folder(folder: Path) -> Path:
    """SD1 of a few channels, as diffusers saves it."""
    return write_folder(make_tiny("sd1", folder / "configs"), folder / "model")


def load_tiny(folder: Path) -> TrainModel:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return TrainModel(pipe, "tiny", folder, dict(pipe.scheduler.config))


def write_pictures(folder: Path, count: int = 6) -> Path:
    """`count` pictures of noise with captions, each twice in an epoch."""
    within = folder / "2_things"
    within.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(within / f"{index}.png")
        (within / f"{index}.txt").write_text(WORDS[index % len(WORDS)])
    return folder


def options_for(pictures: Path, out: Path, **given: Any) -> TrainOptions:
    values = {
        "train_data_dir": pictures,
        "output_dir": out,
        "output_name": "made",
        "save_precision": "float",
        "resolution": SIDE,
        "train_batch_size": 2,
        "max_train_steps": 3,
        "learning_rate": 1e-2,
        "max_data_loader_n_workers": 0,
        "save_state_every_n_steps": 0,
        "device": "cpu",
    }
    return TrainOptions.of(values | given)


def run(model: Path, pictures: Path, out: Path, *, calls: dict[str, Any] | None = None, **given: Any) -> TrainOutcome:
    """Train the model of a folder, loaded anew; `calls` are arguments of `train` beside the options."""
    return train(load_tiny(model), options_for(pictures, out, **given), **calls or {})


def tensors_of(outcome: TrainOutcome) -> dict[str, Tensor]:
    return load_file(outcome.paths[-1])


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
