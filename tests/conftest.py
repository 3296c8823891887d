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
    """A test that leaves torch's gradients switched off would spoil those after it."""
    yield
    assert torch.is_grad_enabled()
