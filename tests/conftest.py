"""Fixtures every test may use."""

import gc
import os
from functools import partial

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core, so one thread for each process
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch


@pytest.fixture(scope="module", autouse=True)
def frozen_caches():
    """What earlier modules keep is not looked through by the collector again at every `unload`."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def grad_mode():
    """Gradients are on, whatever an interrupted test before has left in this process."""
    torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def moving_loras(tmp_path_factory):
    """The LoRA files of `moving_toys`."""
    from tests.moving_toys import write_loras

    return write_loras(tmp_path_factory.mktemp("moving"))


@pytest.fixture
def make_toys(moving_loras):
    """Makes parts and a session on these files."""
    from tests.moving_toys import make_session

    return partial(make_session, moving_loras)


@pytest.fixture
def take_way(monkeypatch):
    """Takes one way for what moves, whatever it costs: toys are too small for any but the exact one."""
    return lambda way: monkeypatch.setattr("lib_lora.moving.choose", lambda *_: way)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a small model that can be trained, where a module has none of its own."""
    from train_runs import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of a training set for it."""
    from train_runs import write_pictures

    return write_pictures(tmp_path_factory.mktemp("set") / "pictures")


@pytest.fixture(scope="module")
def begun(model, pictures, tmp_path_factory):
    """A LoRA file of both whose factors are all other than 0."""
    from train_runs import run

    return run(model, pictures, tmp_path_factory.mktemp("begun"), network_dim=3, network_alpha=2).paths[0]
