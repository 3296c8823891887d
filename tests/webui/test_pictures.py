"""What is applied when: passes, batches, checkpoints, refiners, settings, the cache of conds, faults."""

from __future__ import annotations

import sys

import pytest
import torch

from lib_lora.core import numerics
from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_tensors
from tests.toys import digest, lierla, lora_tensors, write_lora

INK = [("ink", 0.8)]
WASH = [("wash", 0.5)]


def equal(a, b):
    return torch.equal(a, b)


def test_a_tag_gives_the_picture_of_a_session_and_leaves_no_trace_when_it_goes(webui, expected):
    plain = webui.picture("a cat")
    base = webui.state()
    assert equal(plain, expected([], "a cat"))
    assert equal(webui.picture("a cat <lora:ink:0.8>"), expected(INK, "a cat "))
    assert equal(webui.picture("a cat <lora:wash:0.5>"), expected(WASH, "a cat "))
    assert equal(webui.picture("a cat"), plain)
    assert webui.state() == base


def test_both_names_of_the_tag_are_one_request(webui, expected):
    picture = webui.picture("<lyco:wash:0.5>a cat<lora:ink:0.8>")
    assert equal(picture, expected([*WASH, *INK], "a cat"))


def test_hook_mode_and_lora_functional_write_no_weight(webui, expected):
    base = webui.state()
    hooked = webui.picture("a cat <lora:ink:0.3>", override_settings={"prefuse_mode": "hook"})
    assert webui.state() == base
    assert (hooked - expected([("ink", 0.3)], "a cat ")).abs().max() < 1e-3 * hooked.abs().max()
    webui.set(lora_functional=True)
    assert equal(webui.picture("a cat <lora:ink:0.3>"), hooked)
    assert webui.state() == base
    webui.set(prefuse_mode="prefuse")
    webui.picture("a cat <lora:ink:0.3>")
    assert webui.state() != base


def test_compat_a1111_is_read_at_each_generation(webui, expected):
    tags = "a cat <lora:ink:0.5><lora:ink:0.8>"
    compat = webui.picture(tags, override_settings={"prefuse_compat": "a1111"})
    assert equal(compat, expected([("ink", 0.5), ("ink", 0.8)], "a cat ", compat="a1111"))
    assert equal(webui.picture(tags), expected([("ink", 0.5), ("ink", 0.8)], "a cat "))


HIRES = [
    ("a cat <lora:ink:0.8>", "", INK, INK),
    ("a cat <lora:ink:0.8>", "a cat <lora:wash:0.5>", INK, WASH),
    ("a cat <lora:ink:0.8>", "a cat ", INK, []),
    ("a cat ", "a cat <lora:wash:0.5>", [], WASH),
]


@pytest.mark.parametrize(("prompt", "hr_prompt", "first", "second"), HIRES)
def test_each_pass_has_its_own_tags(webui, expected, prompt, hr_prompt, first, second):
    both = webui.picture(prompt, enable_hr=True, hr_prompt=hr_prompt)
    assert equal(webui.picture(prompt, enable_hr=True, hr_prompt=hr_prompt), both)
    # The stand-in adds the second pass's picture to the first's.
    tags = "".join(f"<lora:{name}:{strength}>" for name, strength in second)
    alike = webui.picture(f"a cat {tags}", enable_hr=True) - expected(second, "a cat ")
    assert torch.allclose(both - expected(first, "a cat "), alike, atol=1e-3 * float(alike.abs().max()))


def test_every_batch_is_a_complete_request(webui, expected):
    pictures = webui.generate("a cat <lora:ink:0.8>", n_iter=3).images
    assert all(equal(picture, expected(INK, "a cat ")) for picture in pictures)


def test_the_base_class_of_generations_works_too(webui, expected):
    assert equal(webui.picture("a cat <lora:ink:0.8>", txt2img=False), expected(INK, "a cat "))


@pytest.mark.parametrize("in_place", [True, False])
def test_checkpoints_switch_with_and_without_loras(webui, expected, in_place):
    webui.modules.sd_models.in_place = in_place
    webui.set(sd_model_checkpoint="first")
    for turn in range(6):
        checkpoint = ("first", "second")[turn % 2]
        override = {"sd_model_checkpoint": checkpoint}
        tagged = webui.picture("a cat <lora:ink:0.8>", override_settings=override)
        assert equal(tagged, expected(INK, "a cat ", checkpoint))
        if turn > 2:
            assert equal(webui.picture("a cat", override_settings=override), expected([], "a cat", checkpoint))


def test_a_model_that_is_put_aside_has_its_base_weights_back(webui):
    webui.modules.sd_models.in_place = False
    base, first = webui.state(), webui.model
    webui.picture("a cat <lora:ink:0.8>")
    webui.picture("a cat <lora:ink:0.8>", override_settings={"sd_model_checkpoint": "second"})
    assert webui.model is not first
    assert digest(*first.parts().values()) == base


@pytest.mark.parametrize("in_place", [True, False])
def test_a_refiner_gets_the_loras_of_the_prompt(webui, expected, in_place):
    webui.modules.sd_models.in_place = in_place
    for _ in range(2):
        picture = webui.picture("a cat <lora:ink:0.8>", refiner_checkpoint="second")
        assert equal(picture, expected(INK, "a cat ") + expected(INK, "a cat ", "second"))
    plain = webui.picture("a cat", refiner_checkpoint="second")
    assert equal(plain, expected([], "a cat") + expected([], "a cat", "second"))


def test_a_file_that_changed_changes_the_conds_of_the_same_tag(webui, lora_dir):
    layers = [layer for layer in lierla(KeyMap.from_modules(webui.model.parts())) if layer.component == "te1"]
    path = lora_dir / "changing.safetensors"
    try:
        write_lora(path, layers, seed=1)
        first = webui.picture("a cat <lora:changing:1>")
        assert equal(webui.picture("a cat <lora:changing:1>"), first)
        write_lora(path, layers, seed=2)
        assert not equal(webui.picture("a cat <lora:changing:1>"), first)
    finally:
        path.unlink()


def test_conds_are_encoded_once_while_nothing_changes(webui, monkeypatch):
    from tests.webui.stand_in import Model

    calls = []
    encode = Model.get_learned_conditioning
    monkeypatch.setattr(
        Model, "get_learned_conditioning", lambda self, prompts: calls.append(prompts) or encode(self, prompts)
    )
    webui.picture("a cat <lora:ink:0.8>")
    calls.clear()
    webui.picture("a cat <lora:ink:0.8>")
    assert calls == []
    webui.picture("a cat <lora:ink:0.8>", override_settings={"prefuse_compat": "a1111"})
    assert len(calls) == 2


REFUSED = [
    ("<lora:nosuch:1>", "no LoRA of the"),
    ("<lora:broken:1>", "broken.safetensors is incomplete"),
    ("<lora:ink:abc>", "te is 'abc', not a number"),
    ("<lora:ink:nan>", "beyond the limits"),
    ("<lora:ink:>", "not a number"),
]


@pytest.mark.parametrize(("tag", "sentence"), REFUSED)
def test_a_refused_tag_is_told_and_the_others_apply(webui, expected, caplog, tag, sentence):
    done = webui.generate(f"a cat {tag}<lora:wash:0.5>", n_iter=2)
    assert equal(done.images[0], expected(WASH, "a cat "))
    assert done.comments.count(sentence) == 1
    (status,) = done.extra_generation_params["Prefuse"]
    assert sentence in status["refused"][0]["reason"]
    lines = [record.getMessage() for record in caplog.records if sentence in record.getMessage()]
    assert len(lines) == 1
    assert "ink" not in done.infotexts[0]
    assert not webui.modules.errors.shown


def test_a_fault_that_nobody_thought_of_costs_its_own_lora_only(webui, expected, monkeypatch, caplog):
    import lib_lora.resolve

    load = lib_lora.resolve.load_network

    def fail(path):
        if path.stem == "ink":
            raise RuntimeError("a fault of ours")
        return load(path)

    monkeypatch.setattr(lib_lora.resolve, "load_network", fail)
    done = webui.generate("a cat <lora:ink:0.8><lora:wash:0.5>")
    assert equal(done.images[0], expected(WASH, "a cat "))
    assert "ink is not applied: RuntimeError: a fault of ours" in done.comments
    assert any(record.exc_info for record in caplog.records)
    monkeypatch.undo()
    assert equal(webui.picture("a cat <lora:ink:0.8>"), expected(INK, "a cat "))


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_fault_while_weights_are_written_leaves_the_base(webui, expected, monkeypatch, error):
    base = webui.state()
    fuse, written = numerics.fuse_layer, []

    def fail(*args):
        written.append(args)
        if len(written) > 50:
            raise error("in the middle")
        return fuse(*args)

    monkeypatch.setattr(numerics, "fuse_layer", fail)
    done = webui.generate("a cat <lora:ink:0.8>")
    assert webui.state() == base
    assert equal(done.images[0], expected([], "a cat "))
    assert "ink is not applied" in done.comments
    monkeypatch.undo()
    assert equal(webui.picture("a cat <lora:ink:0.8>"), expected(INK, "a cat "))


def test_after_an_interrupt_the_next_picture_is_right(webui, expected, monkeypatch):
    fuse, left = numerics.fuse_layer, [30]

    def interrupt(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return fuse(*args)

    monkeypatch.setattr(numerics, "fuse_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        webui.picture("a cat <lora:ink:0.8>")
    monkeypatch.undo()
    assert equal(webui.picture("a cat"), expected([], "a cat"))
    assert equal(webui.picture("a cat <lora:ink:0.8>"), expected(INK, "a cat "))


def test_hooks_are_not_used_where_parts_of_the_model_move(webui, expected):
    type(webui.model).lowvram = True
    try:
        done = webui.generate("a cat <lora:ink:0.8>", override_settings={"prefuse_mode": "hook"})
    finally:
        type(webui.model).lowvram = False
    assert equal(done.images[0], expected(INK, "a cat "))
    assert "--medvram and --lowvram" in done.comments


@pytest.mark.parametrize("store", ["device", "file", "auto"])
def test_where_the_base_is_kept_is_a_setting(webui, expected, store):
    webui.picture("a cat <lora:wash:0.5>")
    webui.set(prefuse_base_store=store)
    assert equal(webui.picture("a cat <lora:ink:0.8>"), expected(INK, "a cat "))
    assert equal(webui.picture("a cat"), expected([], "a cat"))


def test_the_store_and_the_cache_can_be_set_for_one_request(webui, monkeypatch):
    import lib_lora.resolve

    state, _ = webui.app.routes["/prefuse/v1/state"]
    read, load = [], lib_lora.resolve.load_network
    monkeypatch.setattr(lib_lora.resolve, "load_network", lambda path: read.append(path.stem) or load(path))
    nothing_kept = {"prefuse_cache_mb": 0, "prefuse_base_store": "pinned"}
    for tag, options in (("wash:0.5", {}), ("ink:0.8", nothing_kept), ("wash:0.5", nothing_kept)):
        webui.picture(f"a cat <lora:{tag}>", override_settings=options)
        assert state().store == ("pinned" if options else "device")
    assert read == ["wash", "ink", "wash"]
    read.clear()
    for tag in ("ink:0.8", "wash:0.5", "ink:0.8", "wash:0.5"):  # another place for the base is a new start
        webui.picture(f"a cat <lora:{tag}>")
    assert read == ["ink", "wash"]


def test_the_network_of_the_settings_is_added_to_the_prompt_once(webui, expected):
    webui.set(sd_lora="ink")
    done = webui.generate("a cat ", n_iter=2)
    assert all(equal(picture, expected([("ink", 1.0)], "a cat ")) for picture in done.images)
    named = webui.picture("a cat <lora:ink:0.8>")
    assert equal(named, expected(INK, "a cat "))


def test_the_prompt_in_the_infotext_names_the_network_of_the_settings(webui):
    webui.set(sd_lora="ink")
    p = webui.modules.processing.StableDiffusionProcessingTxt2Img(prompt="a cat", enable_hr=True)
    webui.modules.processing.process_images(p)
    assert p.all_prompts == ["a cat<lora:ink:1.0>"]


def test_arguments_without_a_meaning_are_told_once_and_ignored(webui, expected):
    done = webui.generate("a cat <lora:ink:0.8:note=me>", n_iter=2)
    assert equal(done.images[0], expected(INK, "a cat "))
    assert done.comments.count("note=me") == 1


def test_a_random_walk_ends_in_the_base(webui):
    import random

    base = webui.state()
    choices = ["<lora:ink:0.8>", "<lyco:wash:-1>", "<lora:nosuch:1>", "<lora:echo:0.3:0>", "<lora:ink:x>", ""]
    walk = random.Random(1)
    for _ in range(30):
        webui.picture(
            "x" + "".join(walk.sample(choices, 2)), override_settings={"prefuse_mode": walk.choice(["auto", "hook"])}
        )
    webui.picture("x")
    assert webui.state() == base
    assert not webui.modules.errors.shown


@pytest.fixture
def half(webui, lora_dir):
    """A LoRA that changes half of its layers by nothing: their weights look untouched when they are fused."""
    layers = lierla(KeyMap.from_modules(webui.model.parts()))
    path = lora_dir / "half.safetensors"
    save_tensors(path, lora_tensors(layers[::2]) | lora_tensors(layers[1::2], std=0.0), {})
    yield
    path.unlink()


def test_the_same_checkpoint_loaded_anew_is_a_new_base(webui, half, expected):
    """As when fp8 storage is switched."""
    webui.picture("a cat <lora:half:0.8>")
    webui.modules.sd_models.reload_model_weights(forced_reload=True)
    assert torch.equal(webui.picture("a cat <lora:wash:0.5>"), expected(WASH, "a cat "))
    assert torch.equal(webui.picture("a cat"), expected([], "a cat"))


def test_a_checkpoint_that_an_extension_loads_by_itself_is_a_new_base(webui, half, templates, expected):
    """Past the callbacks, and with weights that the model had before."""
    webui.picture("a cat <lora:half:0.8>")
    sd_models = webui.modules.sd_models
    sd_models.add_checkpoint("copy", templates["first"].state_dict())
    sd_models.load_model_weights(webui.model, sd_models.checkpoints["copy"][0])
    webui.set(sd_model_checkpoint="copy")
    assert torch.equal(webui.picture("a cat <lora:wash:0.5>"), expected(WASH, "a cat "))
    assert torch.equal(webui.picture("a cat"), expected([], "a cat"))


def test_a_callback_without_new_weights_changes_nothing(webui, expected):
    """As after a change of the VAE."""
    webui.picture("a cat <lora:ink:0.8>")
    webui.modules.script_callbacks.run("model_loaded", webui.model)
    assert torch.equal(webui.picture("a cat"), expected([], "a cat"))


def test_a_fault_in_what_others_are_told_costs_no_lora(webui, expected, monkeypatch):
    webui.picture("a cat <lora:wash:0.5>")
    monkeypatch.setattr(webui.networks, "available_networks", None)  # another extension's doing
    assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), expected(INK, "a cat "))
    assert not webui.modules.errors.shown


def test_a_fault_before_anything_is_applied_leaves_the_base(webui, expected, monkeypatch):
    webui.picture("a cat <lora:wash:0.5>")
    monkeypatch.setattr(sys.modules["lib_lora.hosts.webui.active"], "parse_arguments", lambda _: 1 / 0)
    done = webui.generate("a cat <lora:ink:0.8>")
    assert torch.equal(done.images[0], expected([], "a cat "))
    assert "are not applied" in done.comments
    assert not webui.modules.errors.shown
