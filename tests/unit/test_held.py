"""What is kept while strengths move: how near weights are to the exact sum, and the memory it takes."""

from __future__ import annotations

import pytest
import torch

from lib_lora.core import held, numerics
from lib_lora.core.adapters.full import FullAdapter
from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.core.held import Held
from lib_lora.core.numerics import Term
from lib_lora.core.workspace import Workspace
from tests.moving_toys import (
    BOUND,
    CURVE,
    DENSE,
    DTYPES,
    FLOAT_ERROR,
    STEPS,
    STRENGTHS,
    by_hand,
    check,
    prompt,
    same,
    weights,
)


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moving", [("move",), ("move", "other")])
def test_curves_beside_others_are_within_three_roundings_of_the_exact_sum(make_toys, take_way, dtype, moving):
    take_way("held")
    parts, session = make_toys(dtype)
    base = weights(parts["unet"])
    session.set(prompt("".join(f"<lora:{name}:te=1:unet={CURVE}>" for name in moving)))
    for step in range(STEPS):
        session.advance(step, STEPS)
        now = 0.3 + 0.9 * step / (STEPS - 1)
        check(parts["unet"], base, STRENGTHS | dict.fromkeys(moving, now))
    assert session.report.moves == STEPS - 1
    has_products = len(moving) == 1 and dtype != torch.float16
    assert session.report.held_bytes == nbytes(base) * (1 + has_products)
    told = [lora.moving for lora in session.active]
    assert told == [""] * 3 + ["5 moves, added to the held sum of the others"] * len(moving)
    assert told[-1] in str(session.report)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_curve_is_0_the_weights_are_those_of_the_others_bit_for_bit(make_toys, take_way, dtype):
    take_way("held")
    parts, session = make_toys(dtype)
    session.set(by_hand([("move", 1.0, 0.0)]))
    others, key = weights(parts["unet"]), session.applied_key
    session.set(prompt("<lora:move:te=1:unet=1@0,0@0.5,0@0.75,1@1>"))
    found = []
    for step in range(9):
        session.advance(step, 9)
        found.append((same(weights(parts["unet"]), others), session.applied_key == key))
    assert found == [(4 <= step <= 6,) * 2 for step in range(9)]
    assert session.report.moves == 6


def test_a_curve_without_others_and_one_whose_layers_can_not_hold_are_exact_bit_for_bit(make_toys, take_way):
    take_way("held")
    for name in ("move", *BOUND):
        parts, session = make_toys()
        others = "" if name == "move" else "<lora:ink:0.8>"
        session.set(f"{others}<lora:{name}:te=1:unet={CURVE}>")
        for step in range(STEPS):
            session.advance(step, STEPS)
        done = weights(parts["unet"])
        assert session.report.held_bytes == 0
        again, fresh = make_toys()
        fresh.set([("ink", 0.8, 0.8)] * bool(others) + [(name, 1.0, 1.2)])
        assert same(done, weights(again["unet"]))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("other", ["ink", *BOUND])
def test_dense_families_move_beside_any_family(make_toys, take_way, name, other):
    take_way("held")
    parts, session = make_toys()
    session.set(f"<lora:{other}:0.7><lora:{name}:te=1:unet={CURVE}>")
    for step in range(STEPS):
        session.advance(step, STEPS)
    assert session.report.held_bytes
    moved = weights(parts["unet"])
    session.set([(other, 0.7, 0.7), (name, 1.0, 1.2)])
    exact = weights(parts["unet"])
    assert all((moved[key] - exact[key]).abs().max() < 4 * FLOAT_ERROR for key in exact)


def test_memory_is_free_after_the_last_move_and_not_before(make_toys, take_way):
    take_way("held")
    _, session = make_toys()
    session.set(prompt("<lora:move:te=1:unet=0@0,1@4,1@9>"))
    held = []
    for step in range(10):
        session.advance(step, 10)
        held.append(session._patcher.held_bytes > 0)
    assert held == [False] + [True] * 3 + [False] * 6
    assert session.report.held_bytes > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_the_first_move_nothing_is_multiplied(make_toys, take_way, monkeypatch, dtype):
    take_way("held")
    parts, session = make_toys(dtype)
    base = weights(parts["unet"])
    session.set(prompt())
    session.advance(1, STEPS)
    monkeypatch.setattr(numerics, "fuse_layer", lambda *_: pytest.fail("multiplied again"))
    for step in range(2, STEPS):
        session.advance(step, STEPS)
        check(parts["unet"], base, STRENGTHS | {"move": 0.3 + 0.9 * step / (STEPS - 1)})


def test_two_that_move_one_after_the_other_take_turns_in_the_room_for_a_product(make_toys, take_way):
    take_way("held")
    parts, session = make_toys()
    base = weights(parts["unet"])
    session.set(prompt("<lora:move:te=1:unet=1@0,0@0.5,0@1><lora:other:te=1:unet=0@0,0@0.5,1@1>"))
    for step in range(9):
        session.advance(step, 9)
        half = step / 4 - 1
        check(parts["unet"], base, STRENGTHS | {"move": max(-half, 0.0), "other": max(half, 0.0)})
    assert session.report.held_bytes == 2 * nbytes(base)


@pytest.mark.parametrize(("free", "copies"), [(2.0, 2), (1.99, 1), (None, 2)])
def test_products_are_kept_only_if_memory_for_them_and_the_sums_is_free(make_toys, take_way, monkeypatch, free, copies):
    take_way("held")
    parts, session = make_toys(torch.bfloat16)
    base = weights(parts["unet"])
    monkeypatch.setattr(held, "free_bytes", lambda _: None if free is None else int(free * nbytes(base)))
    session.set(prompt())
    for step in range(STEPS):
        session.advance(step, STEPS)
        check(parts["unet"], base, STRENGTHS | {"move": 0.3 + 0.9 * step / (STEPS - 1)})
    assert session.report.held_bytes == copies * nbytes(base)


def with_room(weight: torch.Tensor) -> Held:
    return Held(((), ()), weight, torch.full_like(weight, torch.nan))


def test_strengths_are_not_rounded_to_the_dtype_of_the_weights():
    generator = torch.Generator().manual_seed(4)
    weight, diff = (torch.randn(64, 50, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty_like(weight)
    with_room(weight).fuse([Term(FullAdapter(diff), 0.3217)], out, Workspace())
    assert torch.equal(out, (weight.double() + 0.3217 * diff.double()).bfloat16())


def test_a_change_that_overflows_at_strength_1_alone_is_not_kept_as_a_product():
    weight = torch.ones(4, 3, dtype=torch.bfloat16)
    out = torch.empty_like(weight)
    with_room(weight).fuse([Term(FullAdapter(torch.full((4, 3), 3e38)), 1e-38)], out, Workspace())
    assert torch.equal(out, torch.full((4, 3), 4.0).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_in_the_room_for_a_product_before_does_not_matter(dtype):
    up, down, weight = torch.ones(6, 2), torch.ones(2, 5), torch.ones(6, 5, dtype=dtype)
    out = torch.empty_like(weight)
    with_room(weight).fuse([Term(LoraAdapter(up, down, 0.5), 3.0)], out, Workspace())
    assert torch.equal(out, torch.full((6, 5), 4.0, dtype=dtype))
