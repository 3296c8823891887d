"""The benchmarks of a GPU run without one, on small models: what they check is checked; they say what is missing."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lib_lora.compile.inductor import Inductor
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


@pytest.mark.slow
def test_compiled_steps_are_compared_with_eager_ones_and_timed(monkeypatch, capsys):
    from benchmarks import compile as compiled
    from benchmarks import gpu_compile

    quick = partial(Inductor, lowering=lambda graph, inputs: graph.forward)  # code is not made, only graphs
    monkeypatch.setattr(compiled, "Inductor", quick)
    monkeypatch.setattr(gpu_compile, "Inductor", quick)
    monkeypatch.setattr(compiled, "SWITCHES", 3)
    assert gpu_compile.main(["--device", "cpu", "--tiny", "--dtype", "fp32", "--repeats", "0.05"]) == 0
    told = capsys.readouterr().out
    for part in ("3 switches between no LoRA and 7", "two pictures at a time", "one picture with a ControlNet"):
        assert f"### {part}" in told or f"### Steps: {part}" in told
    assert "ok   one picture with a ControlNet: difference to eager" in told
