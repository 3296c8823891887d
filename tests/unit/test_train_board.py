"""The log for TensorBoard, read back by TensorBoard itself."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from train_runs import load_tiny, options_for, write_pictures

from lib_lora.errors import OutputError
from lib_lora.train.trainer import train

if TYPE_CHECKING:
    from pathlib import Path

    from lib_lora.train.progress import TrainProgress

pytestmark = pytest.mark.newest

STEPS, STATE_AT = 4, 3
FLOAT32 = 1e-6
"""Of the log's numbers, relative."""


def logged(model: Path, out: Path, **given: Any) -> list[TrainProgress]:
    """Train with a log in the folder ``log``; what was told of each step."""
    pictures = out.parent / "pictures"
    if not pictures.exists():
        write_pictures(pictures)
    told: list[TrainProgress] = []
    given = {"logging_dir": out / "log", "max_train_steps": STEPS, "unet_lr": 2e-3, "text_encoder_lr": 1e-3} | given
    options = options_for(pictures, out, **given)
    train(load_tiny(model), options, progress=told.append, draw_picture=lambda *_: Image.new("RGB", (8, 8), "red"))
    return told


def read(out: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out / "log" / "made")).Reload()


def series(log: Any, name: str) -> dict[int, float]:
    """Step → number; a step that is there twice is an error."""
    events = log.Scalars(name)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_the_log_has_loss_rates_of_each_group_speed_and_samples(model: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    told = logged(model, out, lr_scheduler="linear", sample_prompts=prompts, sample_every_n_steps=2)
    log = read(out)
    assert set(log.Tags()["scalars"]) == {
        *("loss/step", "loss/mean", "steps per second"),
        *(f"lr/{group}" for group in told[0].rates),
    }
    assert len(told[0].rates) == 2
    wanted = {now.step: now.loss for now in told}
    assert series(log, "loss/step") == pytest.approx(wanted, rel=FLOAT32)
    assert series(log, "loss/mean") == pytest.approx({now.step: now.mean_loss for now in told}, rel=FLOAT32)
    for group in told[0].rates:
        rates = series(log, f"lr/{group}")
        assert rates == pytest.approx({now.step: now.rates[group] for now in told}, rel=FLOAT32)
        assert rates[STEPS] < rates[1]
    assert log.Tags()["images"] == ["sample/00", "sample/01"]
    events = log.Images("sample/01")
    assert [event.step for event in events] == [2, 4]
    drawn = np.asarray(Image.open(io.BytesIO(events[0].encoded_image_string)))
    assert (drawn == (255, 0, 0)).all()


def test_a_training_that_is_gone_on_with_goes_on_with_its_log(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = logged(model, out, save_state_every_n_steps=STATE_AT)
    then = logged(model, out, max_train_steps=STEPS + 2, resume=out / "made-state")
    assert then[0].step == STATE_AT + 1
    losses = {now.step: now.loss for now in (*first[:STATE_AT], *then)}
    assert series(read(out), "loss/step") == pytest.approx(losses, rel=FLOAT32)


def test_a_log_that_can_not_be_written_is_one_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"the log in .* can not be written"):
        logged(model, tmp_path / "out", logging_dir=tmp_path / "file")
