"""Which rank a layer gets, beside kohya's rules on the singular values of the whole matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.errors import JobError
from lib_lora.tools.ranks import RankRule

METHODS = {"sv_ratio": (1.5, 2.0, 20.0), "sv_fro": (0.5, 0.9, 0.99), "sv_cumulative": (0.3, 0.6, 0.8)}
PAIRS = [(method, parameter) for method, parameters in METHODS.items() for parameter in parameters]


def kohyas_rank(values: torch.Tensor, rank: int, method: str, parameter: float) -> int:
    """As resize_lora.py computes it from all singular values of up @ down."""
    if method == "sv_ratio":
        index = int((values > values[0] / parameter).sum())
    elif method == "sv_cumulative":
        index = int(torch.searchsorted(values.cumsum(0) / values.sum(), parameter)) + 1
    else:
        squares = values.square()
        index = int(torch.searchsorted(squares.cumsum(0) / squares.sum(), parameter**2)) + 1
    index = max(1, min(index, len(values) - 1))
    return 1 if values[0] <= 1e-6 else min(index + 1, rank)


cases = st.tuples(st.integers(2, 20), st.integers(2, 20), st.integers(1, 12), st.integers(0, 1000))


def singular_values(out: int, columns: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All there are, and those that a product of factors has."""
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(shape, generator=generator) for shape in ((out, rank), (rank, columns)))
    whole = torch.linalg.svdvals(up.double() @ down.double())
    return whole, whole[: min(out, columns, rank)]


@given(cases, st.integers(1, 20), st.sampled_from(PAIRS))
@settings(max_examples=200, deadline=None)
def test_kohyas_ranks_are_kohyas(case, largest, method):
    whole, own = singular_values(*case)
    rule = RankRule(largest, dynamic=method[0], parameter=method[1], kohya=True)
    smaller = min(case[:2])
    assert rule.of(own, case[:2]) == min(kohyas_rank(whole, largest, *method), smaller)


@given(cases, st.sampled_from([0.3, 0.6, 0.9, 0.99, 1.0]))
@settings(max_examples=100, deadline=None)
def test_named_ranks_are_the_smallest_that_keep_what_was_asked(case, part):
    _, own = singular_values(*case)
    rank = RankRule(99, dynamic="sv_cumulative", parameter=part).of(own, case[:2])
    assert own[:rank].sum() >= (part - 1e-12) * own.sum()
    assert rank == 1 or own[: rank - 1].sum() < part * own.sum()
    rank = RankRule(99, dynamic="sv_fro", parameter=part).of(own, case[:2])
    assert own[:rank].norm() >= (part - 1e-12) * own.norm()
    assert rank == 1 or own[: rank - 1].norm() < part * own.norm()


@pytest.mark.parametrize(("ratio", "rank"), [(1, 1), (1.9, 1), (2, 2), (3, 2), (4, 3), (1000, 4)])
def test_sv_ratio_keeps_values_from_that_part_of_the_largest_on(ratio, rank):
    values = torch.tensor([8.0, 4.0, 2.0, 0.01])
    assert RankRule(9, dynamic="sv_ratio", parameter=ratio).of(values, (9, 9)) == rank


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kohya", [False, True])
def test_a_layer_of_zeros_has_rank_1(method, kohya):
    rule = RankRule(4, dynamic=method, parameter=1.0, kohya=kohya)
    assert rule.of(torch.zeros(4), (8, 8)) == 1


@pytest.mark.parametrize(
    ("shape", "ours", "kohyas"), [((64, 64), 4, 4), ((64, 64, 1, 1), 4, 2), ((64, 64, 3, 3), 2, 2)]
)
def test_convolutions_have_their_own_rank(shape, ours, kohyas):
    assert RankRule(4, 2).of(torch.ones(64), shape) == ours
    assert RankRule(4, 2, kohya=True).of(torch.ones(64), shape) == kohyas


def test_a_rank_is_not_larger_than_what_there_is():
    assert RankRule(64).of(torch.ones(8), (32, 48)) == 8
    assert RankRule(64, kohya=True).of(torch.ones(8), (32, 48)) == 32


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 0},
        {"rank": -3},
        {"rank": 4, "conv_rank": 0},
        {"rank": 4, "parameter": 2.0},
        *({"rank": 4, "dynamic": method} for method in METHODS),
        *({"rank": 4, "dynamic": "sv_ratio", "parameter": value} for value in (0.5, float("inf"), float("nan"))),
        *({"rank": 4, "dynamic": "sv_fro", "parameter": value} for value in (0.0, 1.5, -1.0, float("nan"))),
    ],
    ids=str,
)
def test_what_makes_no_rank_is_refused(arguments):
    with pytest.raises(JobError):
        RankRule(**arguments)
