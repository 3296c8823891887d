"""Two processes, joined by gloo, compute what one computes with the joined batch; one that is killed goes on."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from train_runs import options_for, run, tiny_folder, write_pictures

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [pytest.mark.newest, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-6
SECONDS = 240
GIVEN = (
    *("pretrained_model_name_or_path", "train_data_dir", "output_dir", "output_name", "save_precision"),
    *("train_batch_size", "learning_rate", "max_data_loader_n_workers", "device"),
)
"""Options of `options_for` that a command line is told too."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "ACCELERATE_USE_CPU": "true",
    }


def launched(processes: int, arguments: list[str]) -> None:
    """``accelerate launch`` on CPUs, without its own process around it."""
    common = {
        **environment(),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "lib_lora", "train", *arguments]
    started = [
        subprocess.Popen(  # noqa: S603
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    told = [process.communicate(timeout=SECONDS)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes
    assert "1 of 1 steps" in told[0]
    assert told[1:] == [""] * (processes - 1)


def trained_by_two(model: Path, out: Path, **given: object) -> Path:
    """What two processes make, each with half of a batch of 4."""
    values = {
        **given,
        "pretrained_model_name_or_path": model,
        "output_dir": out,
        "output_name": "made",
        "save_precision": "float",
        "resolution": 64,
        "train_batch_size": 2,
        "device": "cpu",
    }
    launched(2, [f"--{key}={value}" for key, value in values.items()])
    return out / "made.safetensors"


def test_first_gradients_of_two_processes_are_those_of_one_with_the_joined_batch(tmp_path):
    model, pictures = tiny_folder(tmp_path), write_pictures(tmp_path / "pictures")
    begun = run(model, pictures, tmp_path / "begun").paths[0]
    given = {
        "optimizer_type": "SGD",
        "learning_rate": 1.0,
        "max_grad_norm": 0,
        "max_train_steps": 1,
        "network_weights": begun,
    }
    alone = run(model, pictures, tmp_path / "alone", train_batch_size=4, **given).paths[0]
    joined = trained_by_two(model, tmp_path / "joined", train_data_dir=pictures, **given)
    before, one, two = (load_file(path) for path in (begun, alone, joined))
    assert one.keys() == two.keys()
    assert largest(before, one) > 100 * TOLERANCE
    assert largest(one, two) < TOLERANCE


def largest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Of all differences."""
    return max(torch.stack([(first[name] - second[name]).abs().max() for name in first])).item()


def test_a_process_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    """Killed as soon as a state of a random step is there, wherever it is then."""
    model, pictures = tiny_folder(tmp_path), write_pictures(tmp_path / "pictures")
    given = {"max_train_steps": 60, "network_dropout": 0.1, "lr_scheduler": "cosine", "save_state_every_n_steps": 1}
    whole = load_file(run(model, pictures, tmp_path / "whole", **given).paths[0])
    out = tmp_path / "out"
    options = options_for(pictures, out, **given, pretrained_model_name_or_path=str(model)).values()
    words = ["--resolution=64", *(f"--{key}={options[key]}" for key in (*given, *GIVEN))]
    process = subprocess.Popen([sys.executable, "-m", "lib_lora", "train", *words], env=environment())  # noqa: S603
    wanted = random.Random(time.time()).randrange(2, 40)
    deadline = time.monotonic() + SECONDS
    while not list((out / "made-state").glob(f"step-{wanted:08d}.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "made.safetensors").exists()
    made = load_file(run(model, pictures, out, resume=out / "made-state", **given).paths[0])
    assert all(torch.equal(made[name], whole[name]) for name in whole)
