"""Trainings that can not begin or go on: one sentence, and what was saved last is kept."""

from __future__ import annotations

import json
import logging
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from train_runs import load_tiny, options_for, run, same, tensors_of

from lib_lora.core import opening
from lib_lora.errors import FileError, JobError, OutputError, PrefuseError, TrainError
from lib_lora.train.control import Wish
from lib_lora.train.encoders import Encoders
from lib_lora.train.state import read_state
from lib_lora.train.trainer import train

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.newest

FLIPS = 100
ENOUGH = {"save_state_every_n_steps": 1, "max_train_steps": 4}


@pytest.fixture(scope="module")
def done(model, pictures, tmp_path_factory) -> Path:
    """The folder of a training with its states of steps 2 and 3."""
    out = tmp_path_factory.mktemp("done")
    run(model, pictures, out, **ENOUGH)
    return out


@pytest.fixture
def ended(done, tmp_path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(done, tmp_path / "ended")


def is_one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and 20 < len(str(error)) < 400


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def emptied(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(cut, "is incomplete"), (flipped, "is damaged: it does not hold what was written"), (emptied, "")],
)
def test_a_damaged_state_is_named_with_the_one_before_it_from_which_it_goes_on(
    model, pictures, ended, done, damage, sentence
):
    older, newer = sorted((ended / "made-state").iterdir())
    newer.write_bytes(damage(newer.read_bytes()))
    with pytest.raises(TrainError, match=rf"{newer.name}.* {sentence}.*the state before it is {older.name}") as caught:
        run(model, pictures, ended, resume=ended / "made-state", **ENOUGH)
    assert is_one_sentence(caught.value)
    made = run(model, pictures, ended, resume=older, **ENOUGH)
    assert same(tensors_of(made), load_file(done / "made.safetensors"))


def test_no_flipped_bit_of_a_state_is_gone_on_from(done, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "CLOCK_TICK_NS", 0)  # nobody else writes: no wait to be sure of it
    source = max((done / "made-state").iterdir())
    data, chance, path = source.read_bytes(), random.Random(0), tmp_path / source.name
    course = json_course(source)
    whole = read_state(source, course)
    header = 8 + int.from_bytes(data[:8], "little")
    bits = [*chance.sample(range(8 * header), FLIPS // 2), *chance.sample(range(8 * header, 8 * len(data)), FLIPS // 2)]
    refused = 0
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = read_state(path, course)
        except PrefuseError:
            refused += 1
        else:
            assert same(dict(found.tensors), dict(whole.tensors)), bit
            assert (found.step, found.numbers) == (whole.step, whole.numbers), bit
    assert refused > 0.95 * len(bits)


def json_course(state: Path) -> dict[str, Any]:
    with safe_open(state, "pt") as file:
        return json.loads(file.metadata()["prefuse_training_state"])["course"]


def test_a_resume_that_is_refused_changes_nothing(model, pictures, ended):
    before = {path: path.read_bytes() for path in ended.rglob("*") if path.is_file()}
    for given in ({"learning_rate": 1e-3}, {"seed": 5}, {"optimizer_type": "SGD"}):
        with pytest.raises(TrainError, match=f"is of another training: {next(iter(given))} was"):
            run(model, pictures, ended, resume=ended / "made-state", **ENOUGH, **given)
    assert {path: path.read_bytes() for path in ended.rglob("*") if path.is_file()} == before


def test_a_state_of_other_pictures_or_another_model_is_refused(model, pictures, ended, tmp_path):
    more = shutil.copytree(pictures, tmp_path / "more")
    (more / "2_things/0.txt").write_text("another caption")
    with pytest.raises(TrainError, match="is of another training: pictures was"):
        run(model, more, ended, resume=ended / "made-state", **ENOUGH)
    other = load_tiny(model)
    with torch.no_grad():
        other.unet.conv_in.weight += 1
    with pytest.raises(TrainError, match="is of another training: model was"):
        train(other, options_for(pictures, ended, resume=ended / "made-state", **ENOUGH))


def test_a_picture_that_can_not_be_read_is_named_skipped_and_counted(model, pictures, tmp_path):
    more = shutil.copytree(pictures, tmp_path / "more")
    (more / "2_things/broken.png").write_bytes(b"no picture")
    options = options_for(more, tmp_path / "out")
    outcome = train(load_tiny(model), options)
    assert outcome.skipped == 1
    assert "1 picture" in str(outcome)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [({}, "has no pictures"), ({"a.txt": b"cat", "b.txt": b"dog"}, "has 2 captions, but no pictures")],
)
def test_a_set_without_pictures_writes_nothing(model, tmp_path, content, sentence):
    folder = tmp_path / "set/1_cat"
    folder.mkdir(parents=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    with pytest.raises(JobError, match=sentence):
        run(model, tmp_path / "set", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_output_folder_that_can_not_be_is_told_before_anything_else(model, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="out can not be made: File exists"):
        run(model, tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("text", [None, "# nothing\n", "a --w wide\n", "a --x 3\n"])
def test_bad_sample_prompts_are_told_before_anything_else(model, tmp_path, text):
    prompts = tmp_path / "prompts.txt"
    if text is not None:
        prompts.write_text(text)
    given = {"sample_prompts": prompts, "sample_every_n_steps": 1}
    with pytest.raises(JobError, match="sample_prompts") as caught:
        run(model, tmp_path / "nowhere", tmp_path / "out", **given)
    assert is_one_sentence(caught.value)


def test_memory_that_runs_out_while_a_sample_is_drawn_does_not_end_the_training(model, pictures, tmp_path, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\n")

    def draw(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    options = options_for(pictures, tmp_path / "out", sample_every_n_steps=2, sample_prompts=prompts)
    with caplog.at_level(logging.WARNING):
        outcome = train(load_tiny(model), options, draw_picture=draw)
    assert "no sample picture after step 2: memory ran out" in caplog.text
    assert same(tensors_of(outcome), tensors_of(run(model, pictures, tmp_path / "plain")))


def test_a_sample_that_can_not_be_written_does_not_end_the_training(model, pictures, tmp_path, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sample").write_text("a file where the folder should be")
    options = options_for(pictures, tmp_path / "out", sample_every_n_steps=2, sample_prompts=prompts)
    with caplog.at_level(logging.WARNING):
        outcome = train(load_tiny(model), options, draw_picture=lambda *_: Image.new("RGB", (8, 8)))
    assert outcome.step == 3
    assert "no sample picture after step 2: the folder" in caplog.text


@pytest.mark.parametrize(("method", "given"), [("moments", "cache_latents"), ("states", "cache_text_encoder_outputs")])
def test_memory_that_runs_out_while_caches_are_made_is_a_sentence(
    model, pictures, tmp_path, monkeypatch, method, given
):
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoders, method, full)
    with pytest.raises(TrainError, match="memory ran out") as caught:
        run(model, pictures, tmp_path, network_train_unet_only=True, **{given: True})
    assert is_one_sentence(caught.value)


def test_a_picture_that_vanishes_ends_the_training_and_the_last_state_goes_on(model, pictures, tmp_path):
    more, out = shutil.copytree(pictures, tmp_path / "more"), tmp_path / "out"
    whole = tensors_of(run(model, pictures, tmp_path / "whole", **ENOUGH))

    def progress(now: Any) -> None:
        if now.step == 2:
            for path in more.rglob("*.png"):
                path.rename(path.with_suffix(".away"))

    with pytest.raises(FileError, match=r"\.png can not be read any more"):
        run(model, more, out, calls={"progress": progress}, **ENOUGH)
    for path in more.rglob("*.away"):
        path.rename(path.with_suffix(".png"))
    assert same(tensors_of(run(model, more, out, resume=out / "made-state", **ENOUGH)), whole)


def test_a_second_training_of_the_same_name_is_refused_while_the_first_one_runs(model, pictures, tmp_path):
    refused: list[str] = []
    others: list[int] = []

    def progress(now: Any) -> None:
        if now.step == 2:
            with pytest.raises(OutputError, match="another training writes into the folder made-state") as caught:
                run(model, pictures, tmp_path)
            refused.append(str(caught.value))
            others.append(run(model, pictures, tmp_path, output_name="other").step)

    first = run(model, pictures, tmp_path, calls={"progress": progress})
    assert refused
    assert others == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.safetensors", "other.safetensors"]
    assert same(tensors_of(first), load_file(tmp_path / "other.safetensors"))


def test_a_training_that_is_refused_leaves_the_next_one_free(model, pictures, tmp_path):
    wishes = iter([Wish.STOP])
    ended = run(model, pictures, tmp_path, calls={"wishes": lambda: next(wishes)}, max_train_steps=3)
    with pytest.raises(OutputError, match="exists already"):
        run(model, pictures, tmp_path)
    assert run(model, pictures, tmp_path, resume=ended.state).step == 3
