"""The benchmarks of a GPU run without one, on small models: what they check is checked; they say what is missing."""

from __future__ import annotations

import pytest
import torch

from lib_lora.core.gpu import grouped

pytestmark = pytest.mark.newest
TINY = ["--device", "cpu", "--tiny", "--dtype", "fp32", "--kind", "LierLa", "--alone", "--repeats", "0.05"]


@pytest.fixture(scope="module")
def gpu_switch():
    from benchmarks import gpu_switch

    return gpu_switch


def test_all_ways_to_switch_are_compared_with_the_float64_sums_and_timed(gpu_switch, capsys):
    assert gpu_switch.main(TINY) == 0
    told = capsys.readouterr().out
    for name in ("patcher, layers", "session, grouped", "patcher, graph", "restore", "base in pinned RAM"):
        assert f"| {name} |" in told
    assert "driver" in told


def test_a_way_that_computes_something_else_ends_the_benchmark(gpu_switch, monkeypatch, capsys):
    add = grouped._add_products

    def add_twice(steps, products):
        add(steps, products)
        steps[0][0][0].out.mul_(1.01)

    monkeypatch.setattr(grouped, "_add_products", add_twice)
    assert gpu_switch.main(TINY) == 1
    assert "Nothing is written: patcher, grouped, LierLa, fp32:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_sentence_says_so(gpu_switch, capsys):
    assert gpu_switch.main([]) == 2
    assert capsys.readouterr().err == "Nothing was measured: torch finds no CUDA device here.\n"
