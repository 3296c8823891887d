"""LoraSession as a person who writes Python meets it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.errors import ModelError, PrefuseError, TagError, UnknownLoraError
from tests.toys import (
    c3lier,
    digest,
    exact_sum,
    kohya_name,
    lierla,
    lora_tensors,
    sd1_unet,
    text_encoder,
    write_lora,
)

FLOAT_ERROR = 2e-6  # absolute, on weights of order 1


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return SimpleNamespace(unet=sd1_unet(), text_encoder=text_encoder(), vae=None)


@pytest.fixture(scope="module")
def base(pipe):
    return digest(pipe.unet, pipe.text_encoder)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    keymap = LoraSession.for_pipeline(pipe, folder).keymap
    write_lora(folder / "ink.safetensors", lierla(keymap), seed=1)
    write_lora(folder / "stripes.safetensors", c3lier(keymap), seed=2, rank=2)
    write_lora(folder / "wash.safetensors", c3lier(keymap), seed=3, rank=8, alpha=None, dtype=torch.float16)
    return folder


@pytest.fixture
def session(pipe, folder):
    session = LoraSession.for_pipeline(pipe, folder)
    yield session
    session.unload()


def weights(pipe) -> str:
    return digest(pipe.unet, pipe.text_encoder)


def test_every_layer_is_the_sum_that_the_request_says(session, pipe, folder):
    base = {layer.key: layer.live().clone() for layer in session.keymap}
    session.set("a fox <lora:ink:0.8:0.5> <lora:stripes:-0.4> <lora:wash:1>")
    options = {"ink": {"seed": 1}, "stripes": {"seed": 2, "rank": 2}}
    tensors = {
        "ink": lora_tensors(lierla(session.keymap), **options["ink"]),
        "stripes": lora_tensors(c3lier(session.keymap), **options["stripes"]),
        "wash": lora_tensors(c3lier(session.keymap), seed=3, rank=8, alpha=None, dtype=torch.float16),
    }
    changed = {layer.key for layer in c3lier(session.keymap)}
    for layer in session.keymap:
        if layer.key not in changed:
            assert torch.equal(layer.live(), base[layer.key])
            continue
        name = kohya_name(layer)
        te = layer.component == "te1"
        parts = [(tensors["stripes"], -0.4), (tensors["wash"], 1.0)]
        parts += [(tensors["ink"], 0.8 if te else 0.5)] if f"{name}.alpha" in tensors["ink"] else []
        assert (layer.live() - exact_sum(base[layer.key], name, parts)).abs().max() < FLOAT_ERROR


def test_the_report_says_what_is_active(session):
    report = session.set("a fox <lora:ink:0.8:0.5> in snow <lora:nope:1><hypernet:x:1>")
    assert report.text == "a fox  in snow <hypernet:x:1>"
    assert [(lora.name, lora.te, lora.unet, lora.layers) for lora in session.active] == [("ink", 0.8, 0.5, 210)]
    assert [refused.name for refused in report.refused] == ["nope"]
    assert report.layers_written == 210
    assert report.store == "device"
    assert report.store_bytes > 0
    assert session.report is report
    text = str(report)
    assert "ink at te 0.8, unet 0.5: LoRA rank 4, 210 of 210 layers" in text
    assert "210 layers fused" in text
    assert report.to_dict()["applied"][0]["name"] == "ink"


def test_only_layers_that_differ_are_written(session):
    session.set([("ink", 0.8), ("stripes", 0.5)])
    again = session.set([("stripes", 0.5), ("ink", 0.8)])
    assert (again.layers_written, again.layers_restored, again.layers_kept) == (0, 0, 296)
    less = session.set([("stripes", 0.5)])
    assert (less.layers_written, less.layers_restored, less.layers_kept) == (210, 0, 86)
    only = session.set([("ink", 0.8)])
    assert (only.layers_written, only.layers_restored) == (210, 86)


def test_the_order_of_the_request_changes_no_bit(session, pipe):
    session.set([("ink", 0.8), ("stripes", 0.5), ("wash", 0.3)])
    first = weights(pipe)
    session.clear()
    session.set([("wash", 0.3), ("ink", 0.8), ("stripes", 0.5)])
    assert weights(pipe) == first


def test_a_lora_named_twice_counts_with_the_sum_of_its_strengths(session, pipe):
    session.set("<lora:ink:0.5><lora:ink:0.75>")
    twice = weights(pipe)
    session.set([("ink", 1.25)])
    assert weights(pipe) == twice


def test_the_webui_mode_counts_the_last_strength_twice(session, pipe):
    session.compat = "a1111"
    session.set("<lora:ink:0.5><lora:ink:0.8>")
    layer = lierla(session.keymap)[0]
    tensors = lora_tensors(lierla(session.keymap), seed=1)
    session_weight = layer.live().clone()
    session.clear()
    expected = exact_sum(layer.live(), kohya_name(layer), [(tensors, 0.8), (tensors, 0.8)])
    assert (session_weight - expected).abs().max() < FLOAT_ERROR


def test_strength_zero_is_the_base_bit_for_bit(session, pipe, base):
    session.set([("ink", 0.0), ("stripes", 0.0)])
    assert weights(pipe) == base
    assert len(session.active) == 2


def test_clear_and_unload_give_the_base_back_and_the_session_goes_on(session, pipe, base):
    session.set([("ink", 0.8)])
    fused = weights(pipe)
    session.clear()
    assert weights(pipe) == base
    assert session.active == ()
    session.set([("ink", 0.8)])
    session.unload()
    assert weights(pipe) == base
    session.set([("ink", 0.8)])
    assert weights(pipe) == fused


def test_a_file_that_changed_on_disk_is_read_again(pipe, tmp_path):
    session = LoraSession.for_pipeline(pipe, tmp_path)
    layers = lierla(session.keymap)
    write_lora(tmp_path / "x.safetensors", layers, seed=1)
    session.set([("x", 1.0)])
    first = weights(pipe)
    write_lora(tmp_path / "x.safetensors", layers, seed=2)
    session.set([("x", 1.0)])
    assert weights(pipe) != first
    session.unload()


def test_parameters_keep_their_storage(session, pipe):
    before = {name: parameter.data_ptr() for name, parameter in pipe.unet.named_parameters()}
    session.set([("ink", 0.8), ("stripes", 1.0)])
    session.clear()
    assert before == {name: parameter.data_ptr() for name, parameter in pipe.unet.named_parameters()}


def test_prefuse_replaces_no_forward(session, pipe):
    session.set([("ink", 0.8), ("stripes", 1.0)])
    for module in pipe.unet.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_hook_mode_writes_no_weight_and_gives_the_same_output(session, pipe, base):
    torch.manual_seed(1)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([10]), torch.randn(1, 7, 32)
    request = [("ink", 0.3), ("stripes", 0.2), ("wash", 0.1)]
    with torch.no_grad():
        session.set(request)
        fused = pipe.unet(*inputs).sample
        session.mode = "hook"
        report = session.set(request)
        assert weights(pipe) == base
        hooked = pipe.unet(*inputs).sample
        session.clear()
        plain = pipe.unet(*inputs).sample
    assert report.mode == "hook"
    assert (fused - hooked).abs().max() < 1e-4 * fused.abs().max()
    assert (fused - plain).abs().max() > 0.01
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_switching_the_mode_leaves_nothing_behind(session, pipe, base):
    session.set([("ink", 0.8)])
    fused = weights(pipe)
    session.mode = "hook"
    session.set([("ink", 0.8)])
    assert weights(pipe) == base
    session.mode = "prefuse"
    session.set([("ink", 0.8)])
    assert weights(pipe) == fused
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_who_listens_hears_of_every_changed_layer(pipe, folder):
    heard = []
    session = LoraSession.for_pipeline(pipe, folder, on_weights_changed=lambda layers: heard.append(len(layers)))
    session.set([("ink", 0.8)])
    session.set([("ink", 0.8)])
    session.set([("stripes", 0.8)])
    session.clear()
    session.unload()
    assert heard == [210, 296, 296]


def test_tuning_one_of_several_is_near_the_exact_weights_and_ends_in_them(session, pipe):
    request = [("ink", 0.8), ("stripes", 0.5), ("wash", 0.3)]
    session.set([("ink", 0.8), ("stripes", 0.9), ("wash", 0.3)])
    exact = weights(pipe)
    target = {layer.key: layer.live().clone() for layer in session.keymap}
    session.set(request)
    with session.tuning("stripes") as turn:
        for strength in (0.1, 0.0, 0.9):
            turn(strength)
        assert all((layer.live() - target[layer.key]).abs().max() < FLOAT_ERROR for layer in session.keymap)
        with pytest.raises(TagError, match="beyond the limits"):
            turn(float("nan"))
    assert weights(pipe) == exact
    assert [lora.unet for lora in session.active] == [0.8, 0.9, 0.3]


def test_tuning_in_hook_mode_is_a_set(session, pipe, base):
    session.mode = "hook"
    session.set([("ink", 0.8), ("stripes", 0.5)])
    with session.tuning("ink") as turn:
        turn(0.1)
        assert weights(pipe) == base
    assert [lora.unet for lora in session.active] == [0.1, 0.5]


def test_an_error_while_tuning_leaves_exact_weights(session, pipe):
    session.set([("ink", 0.8)])
    exact = weights(pipe)
    with pytest.raises(KeyboardInterrupt), session.tuning("ink") as turn:
        turn(0.8)
        raise KeyboardInterrupt
    assert weights(pipe) == exact


def test_what_is_not_active_can_not_be_tuned(session):
    with pytest.raises(UnknownLoraError, match="'ink' is not active"), session.tuning("ink"):
        pass


def test_equal_keys_mean_equal_weights(session):
    keys = []
    for request in ([], [("ink", 0.8)], [("ink", 0.80001)], [("ink", 0.8)], []):
        session.set(request)
        keys.append(session.applied_key)
    assert keys[0] == keys[4] == ""
    assert keys[1] == keys[3] != keys[2]


def test_a_model_without_layers_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no layers for LoRAs"):
        LoraSession({"unet": nn.Identity()}, LoraCatalog([tmp_path]))
    assert issubclass(ModelError, PrefuseError)


def test_a_request_without_end_is_cut_and_told(session):
    start = time.process_time()
    report = session.set("<lora:ink:0.001>" * 600 + "".join(f"<lora:no{number}:1>" for number in range(100_000)))
    assert time.process_time() - start < 10
    assert len(report.applied) == 600
    assert report.refused[-1].reason.startswith("the last 99600 of the LoRAs are not applied")


def test_an_argument_that_is_not_understood_is_told(session):
    report = session.set("<lora:ink:0.8:foo=bar>")
    assert any("foo=bar is not understood" in note for note in report.notes)
    assert report.applied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_restored_bit_for_bit(folder, dtype):
    torch.manual_seed(0)
    unet, te = sd1_unet().to(dtype), text_encoder().to(dtype)
    session = LoraSession({"unet": unet, "te1": te}, LoraCatalog([folder]))
    base = digest(unet, te)
    session.set([("ink", 0.8), ("wash", 0.5)])
    assert digest(unet, te) != base
    session.clear()
    assert digest(unet, te) == base
