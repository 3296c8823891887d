"""What is saved on the way: how often, how much of it is kept, and what is drawn and told."""

from __future__ import annotations

import pytest
from PIL import Image
from train_runs import load_tiny, options_for, run, tiny_folder, write_pictures

from lib_lora.train.results import outdated_epochs, outdated_steps
from lib_lora.train.settings import OutputOptions
from lib_lora.train.trainer import train

pytestmark = pytest.mark.newest


def kohyas_old_step(step: int, every: int, kept: int) -> int:
    """get_remove_step_no: the one file that goes after each time that is saved."""
    old = step - kept - 1
    return old - old % every


@pytest.mark.parametrize(("every", "kept"), [(10, 30), (2, 4), (3, 4), (5, 1), (7, 100)])
def test_files_of_older_steps_go_as_with_kohya(every, kept):
    output = OutputOptions(save_every_n_steps=every, save_last_n_steps=kept)
    there: set[int] = set()
    theirs: set[int] = set()
    for step in range(every, 200, every):
        there = {*there, step} - set(outdated_steps(step, output))
        theirs = {*theirs, step} - {kohyas_old_step(step, every, kept)}
        assert there == theirs


@pytest.mark.parametrize(("every", "kept"), [(1, 2), (3, 1), (2, 5)])
def test_files_of_older_epochs_go_as_with_kohya(every, kept):
    there: set[int] = set()
    for epoch in range(every, 40, every):
        there = {*there, epoch} - set(outdated_epochs(epoch, every, OutputOptions(save_last_n_epochs=kept)))
        assert there == {one for one in range(every, epoch + 1, every) if one > epoch - every * kept}


def test_nothing_goes_where_nothing_is_said():
    assert not outdated_steps(100, OutputOptions(save_every_n_steps=1))
    assert not outdated_epochs(100, 1, OutputOptions())


def test_it_is_saved_drawn_and_told_as_asked(tmp_path):
    model, pictures = tiny_folder(tmp_path / "model"), write_pictures(tmp_path / "pictures", 1)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a\n")
    given = {
        "max_train_epochs": 5,
        "save_n_epoch_ratio": 4,  # 5 // 4: after each epoch
        "save_last_n_epochs": 2,
        "sample_at_first": True,
        "sample_prompts": str(prompts),
        "save_state_on_train_end": True,
        "xformers": True,
    }
    options = options_for(pictures, out, **given)
    outcome = train(load_tiny(model), options, draw_picture=lambda *_: Image.new("RGB", (8, 8)))
    assert sorted(file.name for file in out.glob("*.safetensors")) == [
        "made-000003.safetensors",
        "made-000004.safetensors",
        "made.safetensors",
    ]
    assert [path.name for path in outcome.samples] == ["made_00000000_00.png"]
    assert outcome.notes[0].startswith("xformers changes nothing here")
    assert outcome.state is not None
    longer = run(model, pictures, out, resume=str(outcome.state), max_train_steps=7)
    assert longer.step == 7
