"""States of trainings on the disk: which are kept, and which is gone on from."""

from __future__ import annotations

import os

import torch

from lib_lora.train.state import State, read_state, write_state

COURSE = {"seed": 1}


def write(folder, step, written=None):
    path = write_state(folder, State(step, COURSE, {"up": torch.full((2,), float(step))}, {}), keep=2)
    if written is not None:
        os.utime(path, (written, written))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_written_states_are_kept(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, written=step)
    assert names(tmp_path) == ["step-00000020.safetensors", "step-00000030.safetensors"]


def test_later_steps_of_an_older_training_do_not_push_a_new_state_out(tmp_path):
    for step in (1000, 1500):
        write(tmp_path, step, written=step)
    new = write(tmp_path, 5)
    assert names(tmp_path) == ["step-00000005.safetensors", "step-00001500.safetensors"]
    found = read_state(tmp_path, COURSE)
    assert found.step == 5
    assert torch.equal(found.tensors["up"], torch.full((2,), 5.0))
    assert read_state(new, COURSE).step == 5
