"""Strengths that move, and something fails in mid-pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.core import held, numerics
from lib_lora.core.held import Held, HeldSums
from lib_lora.core.saving import save_tensors
from lib_lora.errors import ForeignWriteError
from tests.moving_toys import (
    PLACES,
    STEPS,
    Toy,
    by_hand,
    factors,
    prompt,
    same,
    set_by_hand,
    weights,
)


@pytest.mark.parametrize(("place", "name"), [(numerics, "fuse_layer"), (held, "multiply"), (Held, "fuse")])
def test_an_interrupt_in_mid_pass_gives_the_base_back_and_the_next_set_is_exact(
    make_toys, take_way, monkeypatch, place, name
):
    take_way("held")
    parts, session = make_toys()
    base, act = weights(parts["unet"]), getattr(place, name)
    for layer in range(1, 3):
        session.set(prompt())
        left = [layer]

        def interrupt(*arguments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            act(*arguments)

        monkeypatch.setattr(place, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.advance(1, STEPS)
        monkeypatch.setattr(place, name, act)
        assert same(weights(parts["unet"]), base)
        assert session._patcher.held_bytes == 0
        session.set(by_hand([("move", 1.0, 0.5)]))
        assert same(weights(parts["unet"]), set_by_hand(make_toys, torch.float32, [("move", 1.0, 0.5)]))


def test_another_programs_write_in_mid_pass_is_noticed_and_not_overwritten(make_toys, take_way):
    take_way("held")
    parts, session = make_toys()
    session.set(prompt())
    session.advance(1, STEPS)
    parts["unet"].one.weight.fill_(7.0)
    before = weights(parts["unet"])
    with pytest.raises(ForeignWriteError, match="changed 1 of 2 fused layers"):
        session.advance(2, STEPS)
    assert same(weights(parts["unet"]), before)


@pytest.mark.parametrize("error", [MemoryError, torch.cuda.OutOfMemoryError])
def test_without_memory_for_sums_all_is_fused_anew_and_that_is_told(make_toys, take_way, monkeypatch, error):
    take_way("held")

    def fail(_, patches, fill):
        if any(patch.held for patch in patches):
            raise error("no memory for it")

    monkeypatch.setattr(HeldSums, "add", fail)
    parts, session = make_toys()
    session.set(prompt())
    for step in range(STEPS):
        session.advance(step, STEPS)
    assert same(weights(parts["unet"]), set_by_hand(make_toys, torch.float32, [("move", 1.0, 1.2)]))
    assert "no memory for it" in " ".join(session.report.notes)
    assert session.active[-1].moving == "5 moves, fused anew"
    assert session.report.refused == ()


def test_a_held_sum_that_overflows_where_the_whole_does_not_is_never_used(make_toys, take_way, tmp_path, moving_loras):
    take_way("held")
    loud = {key: tensor * (5e3 if "up" in key else 1.0) for key, tensor in factors("ink").items()}
    save_tensors(tmp_path / "loud.safetensors", loud, {})
    back = {key: tensor * (-5e3 if "up" in key else 1.0) for key, tensor in factors("ink").items()}
    save_tensors(tmp_path / "back.safetensors", back, {})
    torch.manual_seed(1)
    unet = Toy(torch.float16)
    session = LoraSession({"unet": unet}, LoraCatalog([tmp_path]))
    assert session.set("<lora:loud:90><lora:back:te=90:unet=90@0,89@1>").refused == ()
    for step in range(STEPS):
        session.advance(step, STEPS)
        assert all(weight.isfinite().all() for weight in weights(unet).values())
    assert [lora.moving for lora in session.active] == ["", "5 moves, fused anew"]
    assert any("would overflow" in note for note in session.report.notes)
    moved = weights(unet)
    session.set([("loud", 0.0, 90.0), ("back", 0.0, 89.0)])
    assert same(weights(unet), moved)


def test_weights_in_fp8_are_fused_anew_bit_for_bit(make_toys, take_way):
    take_way("held")
    parts, session = make_toys(torch.bfloat16)
    for place in PLACES:
        layer = parts["unet"].get_submodule(place)
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    session.set(prompt())
    for step in range(STEPS):
        session.advance(step, STEPS)
    moved = [bits(parts["unet"].get_submodule(place).weight) for place in PLACES]
    assert session.report.held_bytes == 0
    session.set(by_hand([("move", 1.0, 1.2)]))
    assert all(
        torch.equal(bits(parts["unet"].get_submodule(place).weight), was)
        for place, was in zip(PLACES, moved, strict=True)
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.uint8).clone()
