"""Trainings that are killed, at random steps and in the middle of what they write, go on to the same bits."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file
from train_runs import options_for, tiny_folder, write_pictures

if TYPE_CHECKING:
    from typing import TextIO

pytestmark = [
    pytest.mark.newest,
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="Windows forks no processes"),
]

TESTS = Path(__file__).parents[1]
KILLS = 30
SECONDS = 1800


def test_thirty_kills_at_random_moments_change_no_bit_of_losses_states_and_results(tmp_path):
    command = [sys.executable, str(TESTS / "killed_trainings.py"), str(tmp_path), str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == KILLS
    assert [kill for kill in kills if kill["differing"]] == []
    assert len({(kill["name"], kill["moment"]) for kill in kills}) == 20, "each way to train is killed in each way"
    assert len({kill["step"] for kill in kills}) > 5
    assert any(kill["states"] for kill in kills)


def test_a_process_that_is_killed_ends_the_others_and_leaves_a_whole_state(tmp_path):
    model, pictures, out = tiny_folder(tmp_path), write_pictures(tmp_path / "pictures"), tmp_path / "out"
    given = {"max_train_steps": 100_000, "save_state_every_n_steps": 1, "pretrained_model_name_or_path": str(model)}
    options = options_for(pictures, out, **given).values()
    keys = ("train_data_dir", "output_dir", "output_name", "max_data_loader_n_workers", "device", *given)
    words = ["--resolution=64", *(f"--{key}={options[key]}" for key in keys)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as told:
        first, second = (joined(rank, port, words, told) for rank in range(2))
    deadline = time.monotonic() + SECONDS
    while not list((out / "made-state").glob("*.safetensors")):
        assert first.poll() is second.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second.kill()
    assert first.wait(timeout=SECONDS) == 1
    assert second.wait() < 0
    assert "one of the 2 processes failed" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (out / "made.safetensors").exists()
    assert all(load_file(path) for path in (out / "made-state").glob("*.safetensors"))


def joined(rank: int, port: int, words: list[str], told: TextIO) -> subprocess.Popen[bytes]:
    """One of two processes of a training; what they say goes into a file."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS.parent),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    command = [sys.executable, "-m", "lib_lora", "train", *words]
    return subprocess.Popen(command, env=environment, stdout=told, stderr=told)  # noqa: S603
