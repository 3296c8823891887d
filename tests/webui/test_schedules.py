"""Strengths that change in time, in the WebUI: every step's weights, both passes, and what is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lib_lora.errors import FuseMemoryError
from lib_lora.session import LoraSession

STEPS = 5
PICTURE_ERROR = 1e-4  # of outputs of order 1 in float32, whose weights were rounded twice or not changed at all


def generation(webui, prompt, **options):
    return webui.modules.processing.StableDiffusionProcessingTxt2Img(prompt=prompt, steps=STEPS, **options)


def steps_of(webui, prompt, **options) -> list[torch.Tensor]:
    """What the model makes of the noise in each step of the last pass."""
    p = generation(webui, prompt, **options)
    webui.modules.processing.process_images(p)
    return p.steps_seen


# Arguments of the tag, and the UNet's strength in each of five steps. The text encoder's is that of step 0.
SCHEDULES = [
    ("0.8:start=2", [0, 0, 0.8, 0.8, 0.8]),
    ("0.8:stop=2", [0.8, 0.8, 0, 0, 0]),
    ("0.8:step=1-3", [0, 0.8, 0.8, 0, 0]),
    ("0.8:start=0.5", [0, 0, 0, 0.8, 0.8]),
    ("0@0,1@1", [0, 0.25, 0.5, 0.75, 1]),
    ("0.5:1@0,0@2", [1, 0.5, 0, 0, 0]),
    ("0.5:unet=0@0,1@0.5;0.5@1", [0, 0.5, 1, 0.75, 0.5]),
]


@pytest.mark.parametrize("mode", ["prefuse", "hook"])
@pytest.mark.parametrize(("arguments", "strengths"), SCHEDULES)
def test_each_step_has_its_strength_as_if_it_was_switched_by_hand(webui, expected, arguments, strengths, mode):
    webui.set(prefuse_mode=mode)
    seen = steps_of(webui, f"a cat <lora:ink:{arguments}>")
    first = arguments.split(":")[0]
    te = 0.0 if strengths[0] == 0 else float(first.split("@")[0])
    te = 0.5 if arguments.startswith("0.5:") else te
    wanted = {unet: expected([("ink", te, unet)], "a cat ", mode=mode) for unet in strengths}
    assert [torch.equal(picture, wanted[unet]) for picture, unet in zip(seen, strengths, strict=True)] == [True] * STEPS


def test_a_schedule_that_is_never_on_is_the_base_bit_for_bit(webui, expected):
    base = webui.state()
    plain = expected([], "a cat ")
    for schedule in ("start=5", "stop=0", "step=3-3", "start=0.99"):
        assert all(torch.equal(seen, plain) for seen in steps_of(webui, f"a cat <lora:ink:1:{schedule}>"))
        assert webui.state() == base


def test_only_the_lora_that_moves_is_fused_again_and_only_when_it_moves(webui, monkeypatch):
    heard = []
    apply = LoraSession.advance

    def advance(session, step, steps):
        before = session.report.moves
        apply(session, step, steps)
        heard.append(session.report.moves - before)

    monkeypatch.setattr(LoraSession, "advance", advance)
    steps_of(webui, "a cat <lora:ink:1:start=3><lora:wash:0.5>")
    assert heard == [0, 0, 0, 1, 0]
    heard.clear()
    steps_of(webui, "a cat <lora:ink:1><lora:wash:0.5>")
    assert heard == []


def test_the_next_picture_begins_at_step_0_and_its_prompt_is_encoded_so(webui, expected):
    for _ in range(2):
        seen = steps_of(webui, "a cat <lora:ink:0.8:stop=3>", n_iter=2)
        assert torch.equal(seen[0], expected([("ink", 0.8)], "a cat "))
        assert torch.equal(seen[-1], expected([("ink", 0.8, 0)], "a cat "))
    assert torch.equal(webui.picture("a cat"), expected([], "a cat"))


@pytest.mark.parametrize("lowvram", [False, True])
@pytest.mark.parametrize(
    ("arguments", "first", "hires"),
    [
        ("0.8:hr=0.3", (0.8, 0.8), (0.3, 0.3)),
        ("0.8:hr=0", (0.8, 0.8), (0, 0)),
        ("0.8:0.6:hrte=0.2", (0.8, 0.6), (0.2, 0.6)),
        ("0.8:hrunet=0.2", (0.8, 0.8), (0.8, 0.2)),
        ("0.8:hr=0.1:hrunet=0.2", (0.8, 0.8), (0.1, 0.2)),
        ("0.8:0.6", (0.8, 0.6), (0.8, 0.6)),
    ],
)
def test_the_hires_pass_has_its_own_strengths(webui, monkeypatch, arguments, first, hires, lowvram):
    monkeypatch.setattr(type(webui.model), "lowvram", lowvram)
    seen = []
    processing = webui.modules.processing
    draw = processing.denoise

    def denoise(p, c, uc):
        seen.append((webui.state(), c))
        return draw(p, c, uc)

    monkeypatch.setattr(processing, "denoise", denoise)
    for te, unet in (first, hires):
        webui.generate(f"a cat <lora:ink:{te}:{unet}>")
    webui.generate(f"a cat <lora:ink:{arguments}>", enable_hr=True)
    assert [state for state, _ in seen[:2]] == [state for state, _ in seen[2:]]
    assert all(torch.equal(cond, again) for (_, cond), (_, again) in zip(seen[:2], seen[2:], strict=True))


def test_samplers_that_call_twice_a_step_and_callers_without_a_denoiser_have_their_steps(fake_modules):
    from lib_lora.hosts.webui.callbacks import _step_of

    heun = [SimpleNamespace(step=call, steps=4, total_steps=8) for call in range(8)]
    params = SimpleNamespace(sampling_step=2, total_sampling_steps=9)
    assert [_step_of(params, denoiser) for denoiser in heun] == [(0, 4)] * 2 + [(1, 4)] * 2 + [(2, 4)] * 2 + [
        (3, 4)
    ] * 2
    assert _step_of(params, None) == (2, 9)


def test_a_curve_of_the_text_encoder_and_a_late_start_are_told(webui):
    for arguments, said in (
        ("0@0,1@1", "te stays at 0, its value in step 0"),
        ("1:start=2", "text encoder part is too"),
    ):
        assert said in webui.generate(f"a cat <lora:ink:{arguments}>").comments


@pytest.mark.parametrize("way", ["held", "hooked"])
def test_a_curve_beside_another_lora_is_near_the_weights_of_a_set_and_its_way_is_told(webui, monkeypatch, way):
    asked = []
    monkeypatch.setattr("lib_lora.moving.choose", lambda movement, _: asked.append(movement.can_hook) or way)
    p = generation(webui, "a cat <lora:wash:0.5><lora:ink:0.5:unet=0.25@0,1.25@1>")
    webui.modules.processing.process_images(p)
    entry = list.copy(p.extra_generation_params["Prefuse"])[0]
    said = {"held": "added to the held sum of the others", "hooked": "hooked, for it acts in 4 steps"}[way]
    assert [lora["moving"] for lora in entry["applied"]] == ["", f"4 moves, {said}"]
    assert asked == [True]
    by_hand = [steps_of(webui, f"a cat <lora:wash:0.5><lora:ink:0.5:{0.25 + step / 4}>") for step in range(STEPS)]
    assert asked == [True]
    assert torch.equal(p.steps_seen[0], by_hand[0][0])
    for step, seen in enumerate(p.steps_seen):
        torch.testing.assert_close(seen, by_hand[step][0], atol=PICTURE_ERROR, rtol=0)


def test_with_lowvram_nothing_is_hooked(webui, monkeypatch):
    asked = []
    monkeypatch.setattr(type(webui.model), "lowvram", True)
    monkeypatch.setattr("lib_lora.moving.choose", lambda movement, _: asked.append(movement.can_hook) or "exact")
    steps_of(webui, "a cat <lora:wash:0.5><lora:ink:0@0,1@1>")
    assert asked == [False]


def test_a_fault_while_strengths_move_leaves_the_base_and_is_told(webui, expected, monkeypatch):
    def fail(session, step, steps):
        session.clear()
        raise FuseMemoryError("not enough memory")

    monkeypatch.setattr(LoraSession, "advance", fail)
    done = webui.generate("a cat <lora:ink:0.8:start=1>")
    assert torch.equal(done.images[0], expected([], "a cat "))
    entries = list.copy(done.extra_generation_params["Prefuse"])
    assert "not enough memory" in entries[0]["refused"][0]["reason"]
