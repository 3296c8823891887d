"""Strengths that move beside others that stay: fused anew, added to held sums, or hooked."""

from __future__ import annotations

import pytest
import torch

from tests.moving_toys import (
    CURVE,
    IN,
    STEPS,
    STRENGTHS,
    by_hand,
    check,
    prompt,
    same,
    set_by_hand,
    weights,
)


def test_keys_differ_from_step_to_step_and_agree_at_equal_strengths(make_toys, take_way):
    take_way("held")
    parts, session = make_toys()
    session.set(prompt("<lora:move:te=1:unet=0.25@0,1.25@0.5,0.25@1>"))
    exact = session.applied_key
    keys, seen = [], []
    for step in range(9):
        session.advance(step, 9)
        keys.append(session.applied_key)
        seen.append(weights(parts["unet"]))
    assert keys[0] == exact
    assert len(set(keys[:5])) == 5
    assert keys[1:4] == keys[7:4:-1]
    assert all(same(seen[step], seen[8 - step]) for step in (1, 2, 3))
    assert exact not in keys[1:]


@pytest.mark.parametrize("way", ["held", "hooked"])
def test_after_a_pass_a_set_is_exact_and_a_restore_gives_the_base(make_toys, take_way, way):
    take_way(way)
    parts, session = make_toys(torch.bfloat16)
    base, wanted = weights(parts["unet"]), set_by_hand(make_toys, torch.bfloat16, [("move", 1.0, 0.75)])
    for end in (lambda: session.set(by_hand([("move", 1.0, 0.75)])), session.clear, session.unload):
        session.set(prompt())
        for step in range(3):
            session.advance(step, STEPS)
        assert not same(weights(parts["unet"]), wanted)
        end()
        assert session._patcher.held_bytes == 0
        assert not any(module._forward_hooks for module in parts["unet"].modules())
        assert same(weights(parts["unet"]), wanted if session.active else base)


def test_text_encoders_stay_as_the_prompt_was_encoded(make_toys, take_way):
    for way in ("held", "hooked", "exact"):
        take_way(way)
        parts, session = make_toys()
        session.set(prompt())
        encoded = weights(parts["te1"])
        for step in range(STEPS):
            session.advance(step, STEPS)
        assert same(weights(parts["te1"]), encoded)


@pytest.mark.parametrize("arguments", ["1:start=2", "1:stop=2", "1:step=1-4"])
def test_on_and_off_are_a_switch_by_hand_bit_for_bit(make_toys, take_way, arguments):
    take_way("held")
    parts, session = make_toys(torch.bfloat16)
    session.set(prompt(f"<lora:move:{arguments}>"))
    for step in range(STEPS):
        session.advance(step, STEPS)
        lora = session._loras[-1].scale
        assert same(weights(parts["unet"]), set_by_hand(make_toys, torch.bfloat16, [("move", 1.0, lora.unet)]))


def test_another_lora_that_starts_within_a_curve_joins_the_held_sum(make_toys, take_way):
    take_way("held")
    parts, session = make_toys()
    base = weights(parts["unet"])
    session.set(prompt(f"<lora:move:te=1:unet={CURVE}><lora:other:1:start=3>"))
    for step in range(STEPS):
        session.advance(step, STEPS)
        now = {"move": 0.3 + 0.9 * step / (STEPS - 1), "other": float(step >= 3)}
        check(parts["unet"], base, STRENGTHS | now)
    assert [lora.moving for lora in session.active[3:]] == [
        "5 moves, added to the held sum of the others",
        "1 move, fused anew",
    ]


def test_a_hooked_lora_is_no_part_of_the_weights_and_its_output_is_that_of_a_set(make_toys, take_way):
    take_way("hooked")
    parts, session = make_toys()
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(3))
    session.set(prompt("<lora:move:te=1:unet=0@0,1@0.4,0@0.8>"))
    others, outputs = weights(parts["unet"]), []
    for step in range(STEPS):
        session.advance(step, STEPS)
        outputs.append(parts["unet"](x))
        assert same(weights(parts["unet"]), others)
    assert session.active[-1].moving == "4 moves, hooked, for it acts in 3 steps"
    for step, strength in enumerate((0, 0.5, 1, 0.5, 0, 0)):
        session.set(by_hand([("move", 1.0, strength)]))
        torch.testing.assert_close(outputs[step], parts["unet"](x), atol=4e-6, rtol=1e-5)


def test_nothing_is_hooked_unless_the_caller_may(make_toys, monkeypatch):
    asked = []
    monkeypatch.setattr("lib_lora.moving.choose", lambda movement, _: asked.append(movement.can_hook) or "exact")
    for may in (False, True):
        _, session = make_toys()
        session.may_hook = may
        session.set(prompt())
        session.advance(1, STEPS)
    assert asked == [False, True]


@pytest.mark.parametrize("options", [{"compat": "a1111"}, {"mode": "hook"}])
def test_the_webuis_rounding_and_hook_mode_have_one_way(make_toys, monkeypatch, options):
    monkeypatch.setattr("lib_lora.moving.choose", lambda *_: pytest.fail("there is nothing to choose"))
    parts, session = make_toys(torch.bfloat16, **options)
    session.set(prompt())
    session.advance(STEPS - 1, STEPS)
    assert same(weights(parts["unet"]), set_by_hand(make_toys, torch.bfloat16, [("move", 1.0, 1.2)], **options))
