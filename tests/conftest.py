"""Fixtures every test may use."""

import gc
import os

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
