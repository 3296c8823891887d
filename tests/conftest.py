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
