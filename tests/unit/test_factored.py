"""Arithmetic on factors, beside the same on whole matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.core.adapters import Factors, load_adapter
from lib_lora.errors import AdapterError
from lib_lora.tools.factored import (
    balanced,
    distance,
    exact_factors,
    small_svd,
    stacked,
    stored,
    truncated,
)

ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13}
"""Of a truncation, relative to the norm of the whole."""
HALF = {torch.float16: 2**-11, torch.bfloat16: 2**-8}

sides = st.integers(1, 24)
ranks = st.integers(1, 30)


def factors(out: int, columns: int, rank: int, scale: float = 1.0, seed: int = 0, dtype=torch.float32) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return Factors(up.to(dtype), down.to(dtype), scale)


def whole(low: Factors) -> torch.Tensor:
    return low.scale * low.up.double() @ low.down.double()


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours - exact).norm() / exact.norm().clamp_min(1e-300)).item()


@given(out=sides, columns=sides, rank=ranks, kept=st.integers(1, 30), dtype=st.sampled_from(list(ROUNDING)))
@settings(max_examples=60, deadline=None)
def test_a_truncation_is_the_best_one(out, columns, rank, kept, dtype):
    low = factors(out, columns, rank, -0.5, dtype=dtype)
    cut = truncated(low, lambda values: kept)
    exact = whole(low)
    u, values, vh = torch.linalg.svd(exact, full_matrices=False)
    assert cut.factors.up.shape == (out, kept)
    assert cut.factors.down.shape == (kept, columns)
    beyond = min(out, columns, rank)
    assert not cut.factors.up[:, beyond:].any()
    tolerance = ROUNDING[dtype] * exact.norm().item()
    best = (u[:, :kept] * values[:kept] @ vh[:kept] - exact).norm().item()
    assert (whole(cut.factors) - exact).norm().item() <= best + tolerance
    assert cut.lost == pytest.approx(best, abs=tolerance)
    assert cut.norm == pytest.approx(exact.norm().item(), abs=tolerance)


def test_the_ranks_are_chosen_from_singular_values_of_the_scaled_matrix():
    low = Factors(torch.diag(torch.tensor([1.0, 3.0, 2.0])), torch.eye(3), 10.0)
    seen: list[torch.Tensor] = []
    cut = truncated(low, lambda values: seen.append(values) or int((values > 15).sum()))
    assert seen[0].tolist() == pytest.approx([30, 20, 10])
    assert cut.factors.up.shape[1] == 2


def test_a_rank_of_4096_on_a_small_layer_is_its_own_best_approximation():
    low = factors(320, 320, 4096)
    cut = truncated(low, lambda values: min(512, len(values)))
    assert cut.factors.up.shape == (320, 320)
    assert relative(whole(cut.factors), whole(low)) < 1e-5


def hilbert(size: int) -> torch.Tensor:
    index = torch.arange(1, size + 1)
    return 1.0 / (index[:, None] + index[None] - 1)


@pytest.mark.parametrize("size", [1, 4, 20, 60])
@pytest.mark.parametrize("kind", ["zeros", "rank 1", "repeated", "hilbert", "tiny and huge"])
def test_ill_conditioned_matrices_are_truncated(kind, size):
    up = {
        "zeros": torch.zeros(size, size),
        "rank 1": torch.ones(size, size),
        "repeated": torch.eye(size),
        "hilbert": hilbert(size),
        "tiny and huge": torch.diag(torch.logspace(-18, 18, size)),
    }[kind]
    low = Factors(up, torch.eye(size), 1.0)
    cut = truncated(low, lambda values: size)
    assert (whole(cut.factors) - whole(low)).norm() <= 1e-5 * whole(low).norm()


def test_singular_values_that_do_not_converge_are_tried_again_in_float64(monkeypatch):
    original, tried = torch.linalg.svd, []

    def svd(matrix, **options):
        tried.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    matrix = hilbert(6)
    u, values, vh = small_svd(matrix)
    assert tried == [torch.float32, torch.float64]
    assert (u * values @ vh - matrix).abs().max() < 1e-6


def test_what_does_not_converge_either_way_is_refused_with_a_sentence():
    with pytest.raises(AdapterError, match="singular values can not be computed"):
        small_svd(torch.tensor([[math.nan, 1.0], [1.0, 1.0]]))


@given(st.lists(st.tuples(ranks, st.floats(-2, 2), st.floats(-3, 3)), min_size=1, max_size=4), sides, sides)
@settings(max_examples=40, deadline=None)
def test_stacked_updates_are_their_sum(parts, out, columns):
    terms = [(factors(out, columns, rank, scale, seed), strength) for seed, (rank, scale, strength) in enumerate(parts)]
    total = stacked(terms)
    assert total.up.shape[1] == sum(rank for rank, _, _ in parts)
    exact = sum(strength * whole(low) for low, strength in terms)
    assert (whole(total) - exact).abs().max() < 1e-12


LAYERS = {
    "LoRA": {"lora_up": (8, 3), "lora_down": (3, 10)},
    "LoRA with a core": {"lora_up": (8, 3), "lora_down": (4, 10), "lora_mid": (3, 4, 3, 3)},
    "LoHa": {"hada_w1_a": (8, 3), "hada_w1_b": (3, 10), "hada_w2_a": (8, 2), "hada_w2_b": (2, 10)},
    "LoHa with cores": {
        **{f"hada_w{i}_a": (3, 8) for i in (1, 2)},
        **{f"hada_w{i}_b": (2, 10) for i in (1, 2)},
        **{f"hada_t{i}": (3, 2, 3, 3) for i in (1, 2)},
    },
    "LoKr": {"lokr_w1": (2, 5), "lokr_w2_a": (4, 3), "lokr_w2_b": (3, 2)},
    "LoKr of factors": {"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 5), "lokr_w2_a": (4, 3), "lokr_w2_b": (3, 2)},
    "LoKr with a core": {
        "lokr_w1": (4, 5),
        "lokr_w2_a": (3, 2),
        "lokr_w2_b": (3, 2),
        "lokr_t2": (3, 3, 3, 3),
    },
}


def layer(name: str):
    generator = torch.Generator().manual_seed(0)
    tensors = {role: torch.randn(shape, generator=generator) for role, shape in LAYERS[name].items()}
    return load_adapter(tensors | {"alpha": torch.tensor(0.5)})


@pytest.mark.parametrize("name", LAYERS)
def test_exact_factors_are_the_update(name):
    adapter = layer(name)
    low = exact_factors(adapter)
    delta = adapter.delta_weight(torch.empty(adapter.shape)).double().flatten(1)
    assert low.up.shape[1] < delta.numel()
    assert relative(whole(low), delta) < 1e-6


def test_an_update_without_factors_has_none():
    assert exact_factors(load_adapter({"diff": torch.ones(4, 3)})) is None
    assert exact_factors(load_adapter({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 3)})) is None


@given(sides, sides, ranks, ranks, st.sampled_from(["other", "same down", "nearly", "itself"]))
@settings(max_examples=60, deadline=None)
def test_a_distance_is_that_of_the_matrices(out, columns, rank, other_rank, kind):
    one = factors(out, columns, rank, 0.5)
    other = {
        "other": factors(out, columns, other_rank, -2.0, seed=1),
        "same down": Factors(one.up * 1.001, one.down, 0.5),
        "nearly": Factors((one.up * 1.0001).half(), (one.down * 0.999).half(), 0.51),
        "itself": one,
    }[kind]
    exact = (whole(one) - whole(other)).norm().item()
    assert distance(one, other) == pytest.approx(exact, rel=1e-6, abs=0 if kind == "itself" else 1e-7)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1.0, 1e5])
def test_balanced_factors_are_the_same_update_with_no_digit_lost(size):
    low = factors(12, 9, 4)
    low = Factors(low.up * size, low.down / size, 0.25)
    even = balanced(low)
    assert torch.equal(even.up @ even.down, low.up @ low.down)
    ratio = even.up.abs().amax(0) / even.down.abs().amax(1)
    assert ((ratio > 0.4) & (ratio < 2.5)).all()


def test_a_component_of_zeros_stays_one():
    even = balanced(Factors(torch.zeros(3, 2), torch.ones(2, 4), 1.0))
    assert even.up.isfinite().all()
    assert not (even.up @ even.down).any()


@given(st.floats(1e-6, 1e5), st.sampled_from([*HALF, torch.float32]), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_a_stored_layer_has_the_scale_it_had_though_alpha_is_rounded(alpha, dtype, rank):
    low = Factors(torch.ones(2, rank), torch.full((rank, 2), 0.5), alpha / rank)
    kept = stored(low, dtype, alpha)
    assert (kept.up.dtype, kept.down.dtype, kept.alpha.dtype) == (dtype,) * 3
    if kept.up.isfinite().all() and kept.up.abs().min() > torch.finfo(dtype).tiny:
        assert relative(whole(kept.factors()), whole(low)) <= HALF.get(dtype, 1e-6)


def test_an_alpha_beyond_the_type_is_folded_into_up():
    low = Factors(torch.full((2, 1), 1e-3), torch.ones(1, 2), 1e5)
    kept = stored(low, torch.float16, 1e5)
    assert kept.alpha == 1
    assert relative(whole(kept.factors()), whole(low)) <= HALF[torch.float16]


def test_alpha_0_stays_0():
    kept = stored(Factors(torch.ones(2, 1), torch.ones(1, 2), 0.0), torch.float16, 0.0)
    assert kept.alpha == 0
    assert kept.up.isfinite().all()
