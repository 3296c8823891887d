"""The setting that compiles the UNet: when it acts, what ends it, what is told of it."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from lib_lora.compile import blockwise, choose
from lib_lora.compile.blockwise import BlockwiseHandle
from lib_lora.compile.inductor import Inductor
from lib_lora.compile.parts import blocks_of

WAIT_SECONDS = 300
TOLERANCE = 1e-5
"""Of the largest number; rounding of float32."""
INK = "a cat <lora:ink:0.8>"
ON, OFF = {"prefuse_compile": "inductor"}, {"prefuse_compile": "off"}


class Quick:
    """A backend that has nothing to compile: its code is the block's, and counts how often it ran."""

    def __init__(self, cache):
        self.cache, self.calls, self.written = cache, 0, []

    def prepare(self, model):
        return BlockwiseHandle(model, "inductor", self)

    def build(self, block, form):
        def compiled(*args, **kwargs):
            self.calls += 1
            return block.eager(*args, **kwargs)

        return compiled

    def renew(self):
        return False

    def weights_changed(self, layers):
        self.written.append([layer.component for layer in layers])


@pytest.fixture(autouse=True)
def backends(monkeypatch):
    """All that were made, in the place of torch.compile."""
    made = []

    def make(cache):
        made.append(Quick(cache))
        return made[-1]

    monkeypatch.setattr(choose, "Inductor", make)
    return made


@pytest.fixture
def real_compiler(backends, monkeypatch):
    """torch.compile for two blocks, which captures their graphs and makes no code of them."""

    def two_blocks(model):
        return {name: block for name, block in blocks_of(model).items() if name in ("down_blocks.0", "up_blocks.0")}

    monkeypatch.setattr(blockwise, "blocks_of", two_blocks)
    monkeypatch.setattr(choose, "Inductor", partial(Inductor, lowering=lookup_backend("aot_eager")))


def compiled_unets(webui):
    return webui.registered._loras().compiled


def handle_of(webui):
    return compiled_unets(webui)._entries[webui.model].handle


def status(webui):
    return compiled_unets(webui).status(webui.model)


def warm(webui, prompt="a cat"):
    """Draw until the compiled blocks answer."""
    webui.picture(prompt)
    assert handle_of(webui).wait(WAIT_SECONDS)
    webui.picture(prompt)


def replaced(model):
    """Parts whose forward is not their class's."""
    return [name for name, part in model.named_modules() if "forward" in vars(part)]


def difference(got, wanted):
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def test_nothing_of_the_model_is_touched_while_the_setting_is_off(webui):
    webui.picture(INK)
    assert replaced(webui.model) == []
    assert str(status(webui)) == "not compiled"


@pytest.mark.usefixtures("real_compiler")
def test_compiled_pictures_are_the_eager_ones_but_for_rounding_after_every_switch(webui, expected):
    base = webui.picture("a cat")
    webui.set(**ON)
    warm(webui)
    before = status(webui)
    assert len(before.compiled) == before.blocks == 2
    for prompt, request in ((INK, [("ink", 0.8)]), ("a cat <lora:wash:-0.4>", [("wash", -0.4)]), ("a cat ", [])):
        assert difference(webui.picture(prompt), expected(request, "a cat ")) < TOLERANCE
    assert difference(webui.picture("a cat"), base) < TOLERANCE
    after = status(webui)
    assert (after.recompiles, after.reason, after.asked) == (0, "", before.asked)
    assert after.switches == 3


def test_switched_off_the_old_pictures_come_back_bit_for_bit(webui):
    base, inked = webui.picture("a cat"), webui.picture(INK)
    webui.set(**ON)
    warm(webui, INK)
    webui.set(**OFF)
    assert torch.equal(webui.picture(INK), inked)
    assert torch.equal(webui.picture("a cat"), base)
    assert replaced(webui.model) == []


def test_compiled_code_draws_and_learns_what_was_written(webui, backends):
    webui.set(**ON)
    warm(webui)
    (backend,) = backends
    assert backend.cache.parts[-2:] == ("prefuse", "inductor")
    calls = backend.calls
    webui.picture(INK)
    assert backend.calls > calls
    assert set(backend.written[-1]) == {"unet", "te1"}


def test_the_setting_acts_at_once(webui):
    webui.picture("a cat")
    webui.set(**ON)
    assert replaced(webui.model)
    webui.set(**OFF)
    assert replaced(webui.model) == []
    webui.set(**ON)
    assert replaced(webui.model)


def test_one_picture_alone_can_be_compiled_or_not(webui):
    base = webui.picture("a cat")
    webui.picture("a cat", override_settings=ON)
    assert replaced(webui.model)
    assert torch.equal(webui.picture("a cat"), base)
    assert replaced(webui.model) == []


@pytest.mark.parametrize("in_place", [True, False])
def test_another_checkpoint_is_compiled_anew_and_the_former_is_left(webui, expected, in_place):
    webui.modules.sd_models.in_place = in_place
    webui.set(**ON, sd_model_checkpoint="first")
    warm(webui)
    first, handle = webui.model, handle_of(webui)
    picture = webui.picture(INK, override_settings={"sd_model_checkpoint": "second"})
    assert difference(picture, expected([("ink", 0.8)], "a cat ", "second")) < TOLERANCE
    assert (webui.model is first) is in_place
    assert handle_of(webui) is not handle
    assert difference(webui.picture(INK), expected([("ink", 0.8)], "a cat ")) < TOLERANCE


def test_a_model_that_is_still_in_memory_stays_compiled(webui):
    webui.modules.sd_models.in_place = False
    webui.set(**ON, sd_model_checkpoint="first")
    warm(webui)
    first, before = webui.model, status(webui)
    webui.picture("a cat", override_settings={"sd_model_checkpoint": "second"})
    webui.picture("a cat")
    assert webui.model is first
    assert status(webui) == before


def test_a_model_that_the_webui_throws_away_is_released_and_goes(webui):
    webui.modules.sd_models.in_place = False
    webui.set(**ON, sd_model_checkpoint="first")
    warm(webui, INK)
    first = weakref.ref(webui.model)
    webui.modules.sd_models.model_data.loaded_sd_models.clear()
    webui.set(sd_model_checkpoint="second")
    webui.picture("a cat")
    assert handle_of(webui).wait(WAIT_SECONDS)
    gc.collect()
    assert first() is None


@pytest.mark.parametrize("what", ["lowvram", "fp8"])
def test_what_can_not_be_compiled_is_told_with_the_picture(webui, what):
    base = webui.picture("a cat")
    place = webui.model if what == "lowvram" else webui.modules.devices
    setattr(place, what, True)
    done = webui.generate("a cat", override_settings=ON)
    assert torch.equal(done.images[0], base)
    assert replaced(webui.model) == []
    assert done.comments.startswith("The model is not compiled: ")
    setattr(place, what, False)
    assert webui.generate("a cat", override_settings=ON).comments == ""
    assert replaced(webui.model)


def change(webui, what, *, on):
    if what == "tokens are merged":
        webui.model.applied_token_merged_ratio = 0.5 * on
    elif what == "a hypernetwork is active":
        webui.modules.shared.loaded_hypernetworks[:] = ["some"] * on
    else:
        webui.modules.sd_hijack.model_hijack.circular_enabled = on


@pytest.mark.parametrize("what", ["tokens are merged", "a hypernetwork is active", "pictures are tiled"])
def test_it_runs_eagerly_while_something_else_acts_on_its_layers(webui, what):
    base = webui.picture("a cat")
    webui.set(**ON)
    warm(webui)
    compiled = webui.picture("a cat")
    change(webui, what, on=True)
    done = webui.generate("a cat")
    assert torch.equal(done.images[0], base)
    assert done.comments == f"It runs eagerly while {what}."
    change(webui, what, on=False)
    done = webui.generate("a cat")
    assert torch.equal(done.images[0], compiled)
    assert done.comments == ""


def test_another_way_to_compute_attention_is_compiled_anew(webui):
    webui.set(**ON)
    warm(webui)
    handle = handle_of(webui)
    webui.modules.sd_hijack.model_hijack.optimization_method = "other"
    webui.picture("a cat")
    assert handle_of(webui) is not handle


def test_hooked_layers_run_eagerly_and_say_so(webui, expected):
    webui.set(**ON)
    warm(webui)
    done = webui.generate(INK, override_settings={"prefuse_mode": "hook"})
    assert torch.equal(done.images[0], expected([("ink", 0.8)], "a cat ", mode="hook"))
    assert "run eagerly while something is hooked into their layers" in str(status(webui))


def test_a_lora_that_moves_is_fused_in_a_compiled_model(webui):
    webui.set(**ON)
    webui.picture("a cat <lora:ink:0.8:start=0.1>")
    assert not webui.registered._loras().sessions.known(webui.model).may_hook
    webui.set(**OFF)
    webui.picture("a cat <lora:ink:0.8:start=0.1>")
    assert webui.registered._loras().sessions.known(webui.model).may_hook


@pytest.mark.parametrize("how", ["unloaded", "given to the built-in extension", "released"])
def test_the_model_is_given_back(webui, how):
    webui.set(**ON)
    warm(webui, INK)
    if how == "unloaded":
        webui.modules.script_callbacks.run("script_unloaded")
    elif how == "released":
        webui.registered._loras().leave()
    else:
        webui.picture("a cat", override_settings={"prefuse_enabled": False})
    assert replaced(webui.model) == []


def test_the_state_tells_how_far_it_is(webui):
    webui.set(**ON)
    warm(webui, INK)
    endpoint, _ = webui.app.routes["/prefuse/v1/state"]
    told = endpoint().compiled
    assert told.text == str(status(webui))
    assert (told.backend, told.blocks, told.progress, told.recompiles) == ("inductor", len(told.compiled), 1.0, 0)


def test_the_settings_page_shows_it_beside_the_choice(webui):
    setting = webui.modules.shared.opts.data_labels["prefuse_compile"]
    assert setting.component_args() == {"choices": ["off", *choose.BACKENDS], "info": ""}
    webui.picture("a cat")
    assert setting.component_args()["info"] == "not compiled"
    webui.set(**ON)
    assert "blocks compiled" in setting.component_args()["info"]
    assert setting.refresh() is None


def test_a_backend_that_is_not_there_leaves_the_picture_right_and_is_told(webui):
    base = webui.picture("a cat")
    done = webui.generate("a cat", override_settings={"prefuse_compile": "tensorrt"})
    assert torch.equal(done.images[0], base)
    assert "torch_tensorrt" in done.comments
