"""Many layers at once, as on a GPU: the numbers of one layer after the other, whatever was recorded or comes late."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from lib_lora.core.adapters import load_adapter
from lib_lora.core.adapters.base import exact_products
from lib_lora.core.gpu import grouped, lanes
from lib_lora.core.gpu.factors import DeviceFactors
from lib_lora.core.gpu.graphs import MOST_GRAPHS, SwitchGraphs
from lib_lora.core.gpu.grouped import GroupedKernel, Sum
from lib_lora.core.numerics import Term
from tests.gpu_stand_ins import Recorder, Stream, on_stream

CPU = torch.device("cpu")
SHAPES = ((48, 32), (48, 32), (24, 16, 3, 3), (32, 48), (48, 32, 1, 1))
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ROUNDINGS = {torch.float32: 8, torch.bfloat16: 1.5, torch.float16: 1.5}
"""Units of the weight's last place: half a one for the sum, the rest for factors times strength."""


class Patch:
    """What a kernel reads of a `LayerPatch`."""

    def __init__(self, terms, networks) -> None:
        self.terms, self.networks = terms, networks


def term(shape, rank: int, factor: float, seed: int, dtype=torch.float32) -> Term:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, *(1,) * len(shape[2:]), generator=generator) * 0.1
    down = torch.randn(rank, *shape[1:], generator=generator) * 0.1
    tensors = {"lora_up": up.to(dtype), "lora_down": down.to(dtype), "alpha": torch.tensor(rank / 2)}
    return Term(load_adapter(tensors), factor)


def sums(dtype=torch.float32, *, seed: int = 0, strength: float = 1.0, ranks=(4, 7), kinds=(torch.float32,) * 2):
    """Layers of several shapes, the second LoRA not in all of them."""
    generator = torch.Generator().manual_seed(99)
    result = []
    for at, shape in enumerate(SHAPES):
        base = torch.randn(shape, generator=generator).to(dtype)
        count = 2 - (at == 3)
        terms = [term(shape, ranks[n], strength * (0.3 + 0.5 * n), seed + 10 * at + n, kinds[n]) for n in range(count)]
        networks = [SimpleNamespace(uid=f"{seed}-{n}") for n in range(count)]
        patch = Patch(terms, networks)
        result.append(Sum(torch.full_like(base, float("nan")), base, patch))
    return result


def check(entries) -> None:
    """One rounding of the float64 sum."""
    for out, base, patch in entries:
        exact = base.double().flatten(1)
        for adapter, factor in patch.terms:
            up, down, scale = adapter.factors()
            exact = exact + factor * scale * (up.double() @ down.double())
        unit = exact.abs().clamp_min(0.05) * ULP[out.dtype]
        assert ((out.double().flatten(1) - exact).abs() / unit).max() <= ROUNDINGS[out.dtype]


HALF = pytest.param(torch.float16, marks=pytest.mark.newest)
"""torch 2.1 has no products of fp16 on a CPU."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF])
@pytest.mark.parametrize("near", [True, False])
def test_layers_of_many_shapes_are_one_rounding_of_the_exact_sum(dtype, near):
    entries = sums(dtype, kinds=(torch.float32, torch.float16))
    GroupedKernel(CPU).write(entries, near=near)
    check(entries)


def test_nothing_depends_on_where_the_work_is_cut(monkeypatch):
    whole, pieces = sums(), sums()
    GroupedKernel(CPU).write(whole, near=True)
    monkeypatch.setattr(grouped, "CHUNK_BYTES", 1)
    monkeypatch.setattr(grouped, "STACK_BYTES", 1)
    GroupedKernel(CPU).write(pieces, near=True)
    assert all(torch.equal(a.out, b.out) for a, b in zip(whole, pieces, strict=True))


def test_an_alpha_of_zero_adds_nothing():
    tensors = {"lora_up": torch.ones(8, 2), "lora_down": torch.ones(2, 8), "alpha": torch.tensor(0.0)}
    patch = Patch([Term(load_adapter(tensors), 1.0)], [SimpleNamespace(uid="a")])
    entry = Sum(torch.empty(8, 8), torch.randn(8, 8), patch)
    GroupedKernel(CPU).write([entry], near=True)
    assert torch.equal(entry.out, entry.base)


def test_recordings_serve_other_loras_and_strengths():
    recorder = Recorder()
    graphs = SwitchGraphs(recorder)
    kernel, weights = GroupedKernel(CPU, graphs), [entry.out for entry in sums()]
    for switch in range(6):  # ranks 4 + 7 and 3 + 9 are both filled up to 16
        ranks = ((4, 7), (3, 9))[switch % 2]
        entries = sums(seed=100 * switch, strength=1 - 0.1 * switch, ranks=ranks)
        entries = [entry._replace(out=out, base=base) for entry, out, base in zip(entries, weights, BASES, strict=True)]
        kernel.write(entries, near=True)
        check(entries)
        for out in weights:
            out.fill_(float("nan"))  # what is replayed writes all of it
    assert len(recorder.recordings) == 1
    assert graphs.replays == 5


BASES = [entry.base for entry in sums()]


def test_weights_at_other_places_are_recorded_anew():
    recorder = Recorder()
    kernel = GroupedKernel(CPU, SwitchGraphs(recorder))
    outs = [[entry.out for entry in sums()] for _ in range(2)]
    for own in (*outs[:1] * 3, *outs[1:] * 3):
        entries = [entry._replace(out=out, base=base) for entry, out, base in zip(sums(), own, BASES, strict=True)]
        kernel.write(entries, near=True)
        check(entries)
    assert len(recorder.recordings) == 2


def test_what_can_not_be_recorded_is_done_as_it_is():
    def refuse(work):
        raise RuntimeError("capture is not permitted")

    done, graphs = [], SwitchGraphs(refuse)
    for _ in range(3):
        graphs.run("key", lambda: done.append(1))
    assert len(done) == 3
    assert "capture is not permitted" in graphs.problem
    assert graphs.replays == 0


def test_recordings_that_were_not_used_for_long_are_forgotten():
    replayed, graphs = [], SwitchGraphs(lambda work: work)
    for key in (*range(MOST_GRAPHS + 1), 0, 0, 0):
        graphs.run(key, lambda: replayed.append(1))
    assert graphs.replays == 2  # the first of the last three found nothing


def test_products_wait_for_the_transfer_of_their_base(monkeypatch):
    """The second stream is never in time of itself; a base that is read too early is NaN."""
    main, side = Stream(), Stream()
    monkeypatch.setattr(lanes.torch.cuda, "stream", on_stream)
    monkeypatch.setattr(lanes.torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(grouped, "CHUNK_BYTES", 8000)
    monkeypatch.setattr(GroupedKernel, "_lane", lambda self, near: lanes.second_stream(side, CPU))
    entries = sums()
    GroupedKernel(CPU).write(entries, near=False)
    check(entries)
    assert side.waits == [(main, 0)]  # the weights may still be read by what was asked before
    awaited = [upto for _, upto in main.waits]
    assert len(set(awaited)) > 2
    assert awaited == sorted(awaited)  # one transfer after the other, all of them in the end


def test_what_comes_after_a_failure_waits_for_all_transfers(monkeypatch):
    main, side = Stream(), Stream()
    monkeypatch.setattr(lanes.torch.cuda, "stream", on_stream)
    monkeypatch.setattr(lanes.torch.cuda, "current_stream", lambda device: main)
    weight = torch.zeros(3)
    with pytest.raises(KeyboardInterrupt), lanes.second_stream(side, CPU) as lane:
        lane.submit(lambda: weight.copy_(torch.ones(3)))
        assert not weight.any()
        raise KeyboardInterrupt
    assert weight.all()


def test_factors_come_in_one_transfer_a_file_and_once():
    adapters = [term((48, 32), 4, 1.0, seed).adapter for seed in range(3)]
    factors = DeviceFactors(CPU)
    factors.bring([adapters])
    first = [factors[adapter] for adapter in adapters]
    assert len({placed.up.untyped_storage().data_ptr() for placed in first}) == 1
    assert factors.nbytes == 3 * 4 * (48 + 32) * 4
    factors.bring([adapters])
    assert all(factors[adapter].up is placed.up for adapter, placed in zip(adapters, first, strict=True))
    up, down, scale = adapters[1].factors()
    assert torch.equal(first[1].up, up.t())
    assert torch.equal(first[1].down, down)
    assert first[1].scale == scale


def test_factors_beyond_the_budget_go_and_those_nobody_has():
    old, new = ([term((48, 32), 4, 1.0, seed).adapter] for seed in range(2))
    factors = DeviceFactors(CPU, budget=4 * (48 + 32) * 4)
    factors.bring([old])
    factors.trim(old)
    factors.bring([new])
    factors.trim(new)
    assert factors.nbytes == 4 * (48 + 32) * 4
    assert factors[new[0]].rank == 4
    new.clear()
    gc.collect()
    assert factors.nbytes == 0


def test_products_are_exact_on_a_gpu_whatever_the_host_allows_and_its_settings_come_back():
    matmul = torch.backends.cuda.matmul
    known = "fp32_precision" if hasattr(torch.backends.cudnn, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, known)
    setattr(matmul, known, "tf32" if known == "fp32_precision" else True)
    matmul.allow_fp16_reduced_precision_reduction = True
    with pytest.raises(KeyError), exact_products(torch.device("cuda")):
        assert getattr(matmul, known) in ("ieee", False)
        assert not matmul.allow_fp16_reduced_precision_reduction
        raise KeyError
    assert getattr(matmul, known) in ("tf32", True)
    assert matmul.allow_fp16_reduced_precision_reduction
    setattr(matmul, known, before)


def test_a_set_that_comes_again_is_not_planned_again_and_another_one_is(monkeypatch):
    planned, entries, others = [], sums(), sums(strength=0.5)
    kernel = GroupedKernel(CPU)
    real = GroupedKernel._batch
    monkeypatch.setattr(GroupedKernel, "_batch", lambda *given: planned.append(1) or real(*given))
    for own in (entries, others, entries, others):
        kernel.write([entry._replace(out=entry.out.fill_(7.0)) for entry in own], near=True)
        check(own)
    assert len(planned) == 2


def test_nothing_is_kept_of_a_set_that_is_larger_than_the_budget(monkeypatch):
    monkeypatch.setattr("lib_lora.core.gpu.factors.BUDGET", 100)
    kernel = GroupedKernel(CPU)
    for seed in range(3):
        entries = sums(seed=seed)
        kernel.write(entries, near=True)
        check(entries)
        assert kernel._factors.nbytes == 0
        assert not kernel._recipes
