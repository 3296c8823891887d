"""On the embedded model a LoRA of drawn pictures learns what the model itself can not draw, in minutes on two cores."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from test_demo_loras import CFG, CLEARLY_VISIBLE, STEPS, outline_darkness

from lib_lora import LoraSession
from lib_lora.hosts.standalone.demo import MODEL_DIR, PROMPTS
from lib_lora.hosts.standalone.demo.drawing import draw, random_scene
from lib_lora.hosts.standalone.loading import load_pipeline
from lib_lora.train.model import TrainModel
from lib_lora.train.options import TrainOptions
from lib_lora.train.trainer import train

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.newest, pytest.mark.slow]

PICTURES, TRAINED_STEPS = 300, 160
LEAST_SUCCESS = 0.8
CONFIG = {
    "resolution": 64,
    "train_batch_size": 16,
    "network_dim": 4,
    "network_alpha": 2,
    "conv_dim": 4,
    "conv_alpha": 2,
    "network_train_unet_only": True,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 0.2,
    "optimizer_args": ["weight_decay=0"],
    "max_train_steps": TRAINED_STEPS,
    "cache_latents": True,
    "cache_text_encoder_outputs": True,
    "vae_batch_size": 50,
    "output_name": "outline",
}


def draw_pictures(folder: Path) -> Path:
    """Shapes with a dark line around them; the captions do not name it."""
    within = folder / "1_outlined"
    within.mkdir(parents=True)
    rng = random.Random(0)
    for index in range(PICTURES):
        scene = replace(random_scene(rng), outline=1.0)
        draw(scene).save(within / f"{index:03d}.png")
        (within / f"{index:03d}.txt").write_text(scene.caption)
    return folder


def luminance(session: LoraSession, pipe: object, strength: float) -> np.ndarray:
    """Of one picture for each example prompt, (N, 64, 64), from 0 to 255."""
    report = session.set([("outline", strength)])
    assert not report.refused
    seeds = [torch.Generator().manual_seed(100 + index) for index in range(len(PROMPTS))]
    size = {"height": 64, "width": 64, "output_type": "np"}
    drawn = pipe(list(PROMPTS), num_inference_steps=STEPS, guidance_scale=CFG, generator=seeds, **size).images
    return drawn @ np.array([0.299, 0.587, 0.114]) * 255


def test_an_outline_is_learned_by_four_of_five_pictures(tmp_path):
    loaded = load_pipeline("demo", "cpu", "fp32")
    loaded.pipe.set_progress_bar_config(disable=True)
    places = {"train_data_dir": draw_pictures(tmp_path / "pictures"), "output_dir": tmp_path / "out"}
    train(TrainModel(loaded.pipe, "demo", MODEL_DIR, loaded.scheduler), TrainOptions.of({**CONFIG, **places}))
    plain = load_pipeline("demo", "cpu", "fp32").pipe
    plain.set_progress_bar_config(disable=True)
    base = luminance(LoraSession.for_pipeline(plain, lora_dir=tmp_path / "out"), plain, 0)
    session = LoraSession.for_pipeline(loaded.pipe, lora_dir=tmp_path / "out")
    none, whole = (luminance(session, loaded.pipe, strength) for strength in (0.0, 1.0))
    assert np.array_equal(none, base)
    shown = [
        outline_darkness(one[None]) - outline_darkness(before[None]) for one, before in zip(whole, none, strict=True)
    ]
    assert np.mean(np.array(shown) > CLEARLY_VISIBLE) >= LEAST_SUCCESS, shown
