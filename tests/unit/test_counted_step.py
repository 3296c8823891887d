"""How much memory a step takes: counted on tensors without content."""

from __future__ import annotations

import pytest
import torch

from benchmarks.counted_step import BLOCK, Allocations, Job, count_step

pytestmark = pytest.mark.newest


def test_storages_are_counted_from_their_making_to_their_end_and_views_not_at_all():
    with Allocations() as memory:
        one = torch.empty(1000)
        assert memory.now == 4096 == 8 * BLOCK
        view = one[:10]
        two = one * 2
        assert memory.now == 2 * 4096
        del one
        assert memory.now == 2 * 4096
        del view
        assert memory.now == 4096
        two += 1
    assert memory.peak == 2 * 4096


def test_the_backward_pass_takes_what_the_forward_kept():
    with Allocations() as memory:
        weight = torch.ones(256, 256, requires_grad=True)
        (weight.exp().sin().sum()).backward()
        assert memory.now == 2 * weight.nbytes, "the weight and its gradient"
        assert memory.peak >= 4 * weight.nbytes


@pytest.mark.slow
def test_gradient_checkpointing_keeps_and_takes_less():
    plain, less = (count_step(Job("small", 64, batch=4, checkpointing=on)) for on in (False, True))
    assert less.kept < 0.25 * plain.kept
    assert less.step < 0.5 * plain.step
    assert (less.weights, less.trained) == (plain.weights, plain.trained)


@pytest.mark.slow
def test_half_precision_halves_the_frozen_weights_and_leaves_the_network_as_it_is():
    whole, half = (count_step(Job("small", 64, dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert half.weights == whole.weights / 2
    assert half.trained == whole.trained
    assert half.step < whole.step
