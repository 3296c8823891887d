"""Pictures of LoRAs that change in time: what a schedule draws, beside weights that are switched by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib_lora import LoraSession
from lib_lora.core.keymap import KeyMap
from lib_lora.errors import ApplyError
from lib_lora.hosts.host import GenerateRequest
from lib_lora.hosts.standalone.generate import generate
from lib_lora.hosts.standalone.loading import load_pipeline
from lib_lora.pipelines import step_callback
from tests.tiny_pipelines import make_tiny, write_folder
from tests.toys import c3lier, digest, lierla, sd1_unet, text_encoder, write_lora

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STEPS = 4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scheduled")
    tiny = make_tiny("sd1", folder / "config")
    keymap = KeyMap.from_modules({"unet": tiny.parts["unet"], "te1": tiny.parts["text_encoder"]})
    write_lora(folder / "loras/ink.safetensors", c3lier(keymap), std=1.0)
    write_lora(folder / "loras/wash.safetensors", lierla(keymap), seed=2)
    return load_pipeline(str(write_folder(tiny, folder / "tiny")), "cpu", "fp32"), folder / "loras"


@pytest.fixture(params=["prefuse", "hook"])
def session(request, loaded):
    session = LoraSession.for_pipeline(loaded[0].pipe, loaded[1], mode=request.param)
    yield session
    session.unload()


@pytest.fixture
def draw(session, loaded):
    def run(prompt, sampler="Euler", **options):
        size = {"steps": STEPS, "seed": 3, "width": 32, "height": 32, "sampler": sampler}
        return generate(loaded[0], session, GenerateRequest(prompt, **size | options))[0]

    return run


def same(one, other) -> bool:
    return one.image.tobytes() == other.image.tobytes()


def test_a_schedule_that_is_never_on_draws_the_base(draw):
    plain = draw("abc")
    for schedule in ("start=4", "stop=0", "step=2-1", "start=0.9", "unet=0@0,0@1:te=0"):
        assert same(draw(f"abc <lora:ink:1:{schedule}>"), plain)
    assert not same(draw("abc <lora:ink:1>"), plain)


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM2 a"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_late_start_draws_what_a_switch_by_hand_draws(session, draw, monkeypatch, sampler, step):
    scheduled = draw(f"abc <lora:ink:1:start={step}><lora:wash:0.5>", sampler)

    def advance(session, now, steps):
        assert steps == STEPS
        if now == step:
            LoraSession.set(session, [("ink", 0.0, 1.0), ("wash", 0.5)])

    monkeypatch.setattr(LoraSession, "advance", advance)
    assert same(draw("abc <lora:wash:0.5>", sampler), scheduled)


def test_every_picture_of_a_request_begins_at_step_0(draw):
    prompt = "abc <lora:ink:1:stop=2>"
    first, again = draw(prompt), draw(prompt)
    assert same(first, again)
    assert first.report.moves == 1
    assert "scheduled strengths moved 1 times" in str(first.report)
    assert "ink at 1, stop=2" in str(first.report)


def test_a_strength_that_stands_still_is_not_written_again(session):
    session.set("<lora:ink:0@0,1@2><lora:wash:0.5>")
    key = session.applied_key
    for step in (0, 2, 3, 9):
        session.advance(step, 10)
    assert session.report.moves == 1
    assert session.applied_key != key


def test_weights_of_each_step_are_those_of_a_set(tmp_path):
    pipe = SimpleNamespace(unet=sd1_unet(), text_encoder=text_encoder(), vae=None)
    session = LoraSession.for_pipeline(pipe, tmp_path)
    write_lora(tmp_path / "ink.safetensors", c3lier(session.keymap), seed=1)
    write_lora(tmp_path / "wash.safetensors", lierla(session.keymap), seed=2)
    moving = []
    session.set("<lora:ink:0.5:unet=0@0,1@1:lbw=MIDD><lora:wash:0.7:start=2>")
    for step in range(5):
        session.advance(step, 5)
        moving.append((digest(pipe.unet, pipe.text_encoder), session.applied_key))
    for step, found in enumerate(moving):
        session.set(f"<lora:ink:0.5:{step / 4}:lbw=MIDD><lora:wash:0:{0.7 if step >= 2 else 0}>")
        assert (digest(pipe.unet, pipe.text_encoder), session.applied_key) == found


def test_a_lora_that_would_overflow_later_is_refused_then_and_the_others_stay(tmp_path):
    pipe = SimpleNamespace(unet=sd1_unet().half(), text_encoder=text_encoder().half(), vae=None)
    session = LoraSession.for_pipeline(pipe, tmp_path)
    write_lora(tmp_path / "loud.safetensors", lierla(session.keymap), std=40.0)
    write_lora(tmp_path / "ink.safetensors", lierla(session.keymap), seed=1)
    session.set([("ink", 0.5)])
    alone = digest(pipe.unet, pipe.text_encoder)
    assert session.set("<lora:ink:0.5><lora:loud:te=0:unet=0@0,90@1>").refused == ()
    session.advance(1, 2)
    assert [lora.name for lora in session.active] == ["ink"]
    assert "would overflow" in session.report.refused[0].reason
    assert digest(pipe.unet, pipe.text_encoder) == alone


def test_a_fault_while_strengths_move_gives_the_base_back(session, loaded, monkeypatch):
    base = digest(loaded[0].pipe.unet)
    session.set("<lora:ink:1:stop=1>")

    def fail(*_, **__):
        raise ApplyError("broken")

    monkeypatch.setattr(session._applier.patcher, "apply", fail)
    with pytest.raises(ApplyError):
        session.advance(1, 4)
    assert digest(loaded[0].pipe.unet) == base
    assert session.active == ()


def test_a_step_callback_counts_steps_not_calls():
    seen = []
    callback = step_callback(lambda step, steps: seen.append((step, steps)))
    pipe = SimpleNamespace(scheduler=SimpleNamespace(order=2), num_timesteps=7)
    assert [callback(pipe, call, None, {}) for call in range(7)] == [{}] * 7
    assert seen == [(0, 4), (1, 4), (1, 4), (2, 4), (2, 4), (3, 4)]
