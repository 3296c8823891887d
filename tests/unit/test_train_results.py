"""What a training leaves: LoRAs that load at once, tuned models in both layouts, samples; and what steers it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import write_tokenizer
from train_runs import load_tiny, options_for, run, same, tensors_of

from lib_lora import LoraSession
from lib_lora.__main__ import main
from lib_lora.cli import train as command
from lib_lora.errors import JobError, OutputError
from lib_lora.hosts.standalone.loading import LoadedModel, load_pipeline
from lib_lora.hosts.standalone.training import picture_drawer
from lib_lora.train.control import SignalFiles, Wish
from lib_lora.train.results import check_results
from lib_lora.train.samples import SamplePrompt, read_prompts
from lib_lora.train.trainer import train

pytestmark = pytest.mark.newest

HALF_TOLERANCE = 1e-3


def test_a_trained_lora_changes_the_session_it_is_set_in_as_it_did_in_training(model, pictures, tmp_path):
    loaded = load_tiny(model)
    inputs = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 77, 8)
    before = loaded.unet(*inputs).sample
    learned: list[torch.Tensor] = []

    def progress(now: Any) -> None:
        if now.step == now.steps:
            with torch.no_grad():
                learned.append(loaded.unet.eval()(*inputs).sample)

    train(loaded, options_for(pictures, tmp_path, learning_rate=0.1, max_train_steps=5), progress=progress)
    session = LoraSession.for_pipeline(loaded.pipe, lora_dir=tmp_path)
    session.catalog.refresh()
    report = session.set("<lora:made:1>")
    after = loaded.unet(*inputs).sample
    assert not report.refused
    assert not report.notes
    assert (after - before).abs().max() > 100 * HALF_TOLERANCE * before.abs().max()
    assert torch.allclose(after, learned[0], atol=HALF_TOLERANCE * before.abs().max().item())


def test_files_on_the_way_have_kohyas_names_and_say_how_far_they_are(model, pictures, tmp_path):
    run(
        model,
        pictures,
        tmp_path,
        max_train_steps=12,
        save_every_n_epochs=1,
        save_every_n_steps=5,
        save_precision="fp16",
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "made-000001.safetensors",
        "made-step00000005.safetensors",
        "made-step00000010.safetensors",
        "made.safetensors",
    ]
    steps = {}
    for name in names:
        with safe_open(tmp_path / name, "pt") as file:
            steps[name] = file.metadata()["ss_steps"], file.metadata()["ss_epoch"]
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    assert list(steps.values()) == [("6", "1"), ("5", "1"), ("10", "2"), ("12", "2")]


def test_a_tuned_unet_is_saved_as_a_folder_and_as_a_checkpoint(model, pictures, tmp_path):
    outcome = run(model, pictures, tmp_path, full=True, learning_rate=1e-2, save_precision="fp16")
    folder, file = outcome.paths
    before, after = load_tiny(model).pipe, StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    whole = load_pipeline(folder, "cpu", "fp32").pipe
    moved = [
        not torch.allclose(one, other, atol=1e-3)
        for one, other in zip(before.unet.parameters(), after.unet.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    for part in ("vae", "text_encoder"):
        old, new = (getattr(pipe, part).state_dict() for pipe in (before, after))
        assert old.keys() == new.keys()
        assert all(torch.allclose(old[name].float(), new[name].float(), atol=HALF_TOLERANCE) for name in old)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    single = load_pipeline(file, "cpu", "fp32", tokenizer=tokenizer, config=folder).pipe
    assert same(dict(single.unet.state_dict()), dict(whole.unet.state_dict()))


def test_a_tuned_unet_goes_on_to_the_same_bits(model, pictures, tmp_path):
    given = {"full": True, "max_train_steps": 4}
    expected = tensors_of(run(model, pictures, tmp_path / "whole", **given))
    wishes = iter([Wish.GO, Wish.STOP])
    ended = run(model, pictures, tmp_path / "out", calls={"wishes": lambda: next(wishes)}, **given)
    assert not same(tensors_of(ended), expected)
    assert same(tensors_of(run(model, pictures, tmp_path / "out", resume=ended.state, **given)), expected)


def test_the_average_is_saved_and_the_last_weights_go_on(model, pictures, tmp_path):
    plain = tensors_of(run(model, pictures, tmp_path / "plain", max_train_steps=6))
    mean = tensors_of(run(model, pictures, tmp_path / "mean", max_train_steps=6, ema=True, save_every_n_steps=2))
    assert plain.keys() == mean.keys()
    assert not same(plain, mean)


def test_samples_are_drawn_with_what_is_learned_and_change_nothing(model, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b --w 64 --h 64 --s 2 --d 4 --l 3\n\n# no prompt\nc d --n a --w 64 --h 64 --s 2\n")
    plain = run(model, pictures, tmp_path / "plain", max_train_steps=4)
    loaded, out = load_tiny(model), tmp_path / "drawn"
    options = options_for(pictures, out, max_train_steps=4, sample_every_n_steps=2, sample_prompts=prompts)
    hashed = next((model / "unet").glob("*.safetensors"))
    draw = picture_drawer(LoadedModel(loaded.pipe, "tiny", (), hashed, loaded.scheduler), [tmp_path / "plain"])
    outcome = train(loaded, options, draw_picture=draw)
    assert [path.name for path in outcome.samples] == [
        f"made_0000000{step}_0{index}.png" for step in (2, 4) for index in (0, 1)
    ]
    for path in outcome.samples:
        with Image.open(path) as image:
            assert image.size == (64, 64)
    assert outcome.samples[0].read_bytes() != outcome.samples[2].read_bytes()
    assert same(tensors_of(outcome), tensors_of(plain))


def test_a_sample_that_can_not_be_drawn_does_not_end_the_training(model, pictures, tmp_path, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\n")

    def draw(*_: Any) -> Any:
        raise JobError("no ink")

    options = options_for(pictures, tmp_path, sample_every_n_steps=2, sample_prompts=prompts)
    with caplog.at_level(logging.WARNING):
        outcome = train(load_tiny(model), options, draw_picture=draw)
    assert outcome.step == 3
    assert "no sample picture after step 2: no ink" in caplog.text


def test_prompts_are_read_in_kohyas_form(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat, best --n bad hands --w 512 --h 768 --d 7 --l 7.5 --s 28\n# no\n\na dog\n")
    assert read_prompts(file) == [
        SamplePrompt("a cat, best", "bad hands", 512, 768, 7, 7.5, 28),
        SamplePrompt("a dog", seed=3),
    ]


def test_prompts_have_samplers_of_their_own_and_sides_that_can_be(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --W 100 --ss k_euler\na dog --ss DPM++ 2M\n")
    assert read_prompts(file) == [
        SamplePrompt("a cat", width=96, seed=0, sampler="Euler"),
        SamplePrompt("a dog", seed=1, sampler="DPM++ 2M"),
    ]


FILES = {
    "prompts.json": '[{"prompt": "a cat", "scale": 7.5, "sample_steps": 28}, "a dog --w 64"]',
    "prompts.toml": '[prompt]\nscale = 7.5\nsample_steps = 28\n[[prompt.subset]]\nprompt = "a cat"\n'
    '[[prompt.subset]]\nprompt = "a dog"\nscale = 3\n',
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_read_from_kohyas_tables(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    first, second = read_prompts(tmp_path / name)
    assert first == SamplePrompt("a cat", cfg=7.5, steps=28)
    assert (second.prompt, second.seed) == ("a dog", 1)
    assert (second.width, second.cfg) == ((64, 7.5) if name.endswith("json") else (None, 3.0))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("prompts.txt", "a --x 3\n", "no --x"),
        ("prompts.txt", "a --w wide\n", "width must be a whole number, not 'wide'"),
        ("prompts.txt", "# nothing\n", "has no prompt"),
        ("prompts.json", "[", "can not be read"),
        ("prompts.json", "[3]", "prompt 1 of the file is none"),
        ("prompts.json", "3", "prompt 1 of the file is none"),
        ("prompts.toml", "[prompt]\nsubset = [3]\n", "prompt 1 of the file is none"),
        ("prompts.json", '[{"prompt": "a", "heigth": 3}]', "no heigth; there are prompt"),
        ("prompts.toml", "[prompt]\nscale = 2\n", "prompt 1 of the file is none"),
    ],
)
def test_prompts_that_can_not_be_are_one_sentence(tmp_path, name, text, sentence):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(JobError, match=sentence):
        read_prompts(file)


def test_missing_regularisation_pictures_are_drawn_by_the_model(model, pictures, tmp_path):
    reg = tmp_path / "reg"
    reg.mkdir()
    loaded = load_tiny(model)
    hashed = next((model / "unet").glob("*.safetensors"))
    draw = picture_drawer(LoadedModel(loaded.pipe, "tiny", (), hashed, loaded.scheduler), [])
    given = {"reg_data_dir": reg, "class_prompt": "a b", "num_class_images": 2, "max_train_steps": 2}
    options = options_for(pictures, tmp_path / "out", **given)
    train(loaded, options, draw_picture=draw)
    drawn = sorted(path.name for path in reg.rglob("*.png"))
    assert len(drawn) == 2
    with pytest.raises(JobError, match="1 regularisation pictures are missing"):
        train(load_tiny(model), options_for(pictures, tmp_path / "more", **given | {"num_class_images": 3}))


def test_a_log_for_tensorboard_needs_it(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(JobError, match="pip install tensorboard"):
        run(model, pictures, tmp_path, logging_dir=tmp_path / "log")


def test_files_pause_and_end_a_training(tmp_path):
    files = SignalFiles(tmp_path, "made")
    assert files.wish() is Wish.GO
    (tmp_path / "made.pause").touch()
    assert files.wish() is Wish.PAUSE
    (tmp_path / "made.stop").touch()
    assert files.wish() is Wish.STOP
    files.forget_stop()
    assert files.wish() is Wish.PAUSE


def test_a_file_where_the_output_folder_should_be_is_told_by_its_name(pictures, tmp_path):
    (tmp_path / "out").touch()
    options = options_for(pictures, tmp_path / "out")
    with command.asked(options), pytest.raises(OutputError, match=r"the folder .*out can not be made"):
        check_results(options)


def test_ctrl_c_once_ends_the_training_and_saves_and_twice_ends_it_at_once(pictures, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with command.asked(options_for(pictures, tmp_path)) as wishes:
        assert wishes() is Wish.GO
        os.kill(os.getpid(), signal.SIGINT)
        assert wishes() is Wish.STOP
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_trains(model, pictures, tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_text(
        f"pretrained_model_name_or_path = '{model}'\ntrain_data_dir = '{pictures}'\nresolution = 64\n"
        f"output_dir = '{tmp_path / 'out'}'\nmax_train_steps = 9\ndevice = 'cpu'\n"
    )
    assert main(["train", str(config), "--max_train_steps", "2", "--output-name=mine", "--json"]) == 0
    assert '"step": 2' in capsys.readouterr().out
    assert load_file(tmp_path / "out" / "mine.safetensors")
