"""On the embedded model a LoRA of drawn pictures learns what the model itself can not draw, in minutes on two cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from test_demo_loras import CFG, STEPS

from benchmarks.effects import CLEARLY_VISIBLE, drawn, luminance, outline_darkness
from lib_lora import LoraSession
from lib_lora.hosts.standalone.demo import CONFIG_DIR, PROMPTS
from lib_lora.hosts.standalone.demo.lora_pictures import write_pictures
from lib_lora.hosts.standalone.loading import load_pipeline
from lib_lora.hosts.standalone.training import model_to_train
from lib_lora.train.option_values import read_toml
from lib_lora.train.options import TrainOptions
from lib_lora.train.trainer import train

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.newest, pytest.mark.slow]

PICTURES = 300
LEAST_SUCCESS = 0.8
SHORTER = {"train_batch_size": 16, "max_train_steps": 160, "lr_warmup_steps": 0.2}


def pictures_at(pipe: object, folder: Path, strength: float) -> np.ndarray:
    """Luminance of one picture for each example prompt, (N, 64, 64)."""
    report = LoraSession.for_pipeline(pipe, lora_dir=folder).set([("outline", strength)])
    assert not report.refused
    return luminance(drawn(pipe, PROMPTS, STEPS, CFG, first_seed=100))


def test_an_outline_is_learned_by_four_of_five_pictures(tmp_path):
    places = {"in_json": write_pictures("outline", tmp_path / "pictures", PICTURES), "output_dir": tmp_path / "out"}
    options = TrainOptions.of(read_toml(CONFIG_DIR / "outline.toml") | SHORTER | places)
    loaded, plain = (load_pipeline("demo", "cpu", "fp32") for _ in range(2))
    for one in (loaded, plain):
        one.pipe.set_progress_bar_config(disable=True)
    train(model_to_train(loaded, options.model), options)
    base = luminance(drawn(plain.pipe, PROMPTS, STEPS, CFG, first_seed=100))
    none, whole = (pictures_at(loaded.pipe, tmp_path / "out", strength) for strength in (0.0, 1.0))
    assert np.array_equal(none, base)
    shown = outline_darkness(whole) - outline_darkness(none)
    assert np.mean(shown > CLEARLY_VISIBLE) >= LEAST_SUCCESS, shown
