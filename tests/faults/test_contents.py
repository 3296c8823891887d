"""LoRA files that can be read and must not be applied, or only with a word: the weights stay what they were."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.core.network import load_network
from lib_lora.core.plan import match_network
from lib_lora.core.saving import save_tensors
from lib_lora.errors import ShapeMismatchError
from lib_lora.session import LoraSession
from tests.toys import c3lier, digest, kohya_name, lierla, lora_tensors, sd1_unet, sdxl_unet, text_encoder

LAYERS = 722


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return sdxl_unet()


@pytest.fixture(scope="module")
def base(unet):
    return digest(unet)


@pytest.fixture
def session(unet, tmp_path):
    session = LoraSession({"unet": unet}, LoraCatalog([tmp_path]))
    yield session
    session.unload()


@pytest.fixture(scope="module")
def layers(unet, tmp_path_factory):
    return lierla(LoraSession({"unet": unet}, LoraCatalog([tmp_path_factory.mktemp("none")])).keymap)


def refused(session, path, tensors, metadata=None) -> str:
    """The sentence with which the file is refused."""
    save_tensors(path / "bad.safetensors", tensors, metadata or {}, overwrite=True)
    report = session.set([("bad", 1.0)])
    assert not report.applied
    return report.refused[0].reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["lora_up.weight", "lora_down.weight"])
def test_one_nan_in_one_of_722_layers_is_found_and_named(session, unet, base, layers, tmp_path, value, role):
    tensors = lora_tensors(layers, rank=2)
    layer = layers[361]
    tensors[f"{kohya_name(layer)}.{role}"].view(-1)[3] = value
    reason = refused(session, tmp_path, tensors)
    assert "1 of 722 layers hold NaN or infinity" in reason
    assert layer.key.split(".", 1)[1].replace(".", "_") in reason
    assert digest(unet) == base


def test_a_bad_lora_does_not_take_the_good_ones_along(session, unet, layers, tmp_path):
    save_tensors(tmp_path / "good.safetensors", lora_tensors(layers, rank=2, seed=1))
    session.set([("good", 0.5)])
    alone = digest(unet)
    tensors = lora_tensors(layers, rank=2)
    tensors[f"{kohya_name(layers[0])}.lora_up.weight"][0, 0] = math.nan
    save_tensors(tmp_path / "bad.safetensors", tensors)
    report = session.set("a cat <lora:bad:1> <lora:good:0.5> <lora:missing:1> <lora:good:x>")
    assert [lora.name for lora in report.applied] == ["good"]
    assert len(report.refused) == 3
    assert digest(unet) == alone


def test_one_wrong_dimension_in_any_layer_refuses_the_file_before_the_first_write(session, layers, tmp_path):
    save_tensors(tmp_path / "good.safetensors", lora_tensors(layers, rank=2))
    good = load_network(tmp_path / "good.safetensors")
    for number, (name, adapter) in enumerate(good.adapters.items()):
        up, down, scale = adapter.factors()
        wrong = LoraAdapter(up, torch.zeros(2, down.shape[1] + 1), scale)
        if number % 2:
            wrong = LoraAdapter(torch.zeros(up.shape[0] + 1, 2), down, scale)
        with pytest.raises(ShapeMismatchError, match=f"1 of {LAYERS} layers have another shape") as refusal:
            match_network(session.keymap, replace(good, adapters=good.adapters | {name: wrong}))
        assert session.keymap.find(name).key in str(refusal.value)


def test_a_file_of_another_shape_leaves_the_weights_alone(session, unet, base, layers, tmp_path):
    tensors = lora_tensors(layers, rank=2)
    name = kohya_name(layers[-1]) + ".lora_down.weight"
    tensors[name] = torch.zeros(2, tensors[name].shape[1] + 1, *tensors[name].shape[2:])
    assert "1 of 722 layers have another shape" in refused(session, tmp_path, tensors)
    assert digest(unet) == base


@pytest.mark.parametrize(("foreign", "known"), [(0, 722), (8, 714), (361, 361), (722, 0)])
def test_foreign_layers_are_counted(session, layers, tmp_path, foreign, known):
    tensors = lora_tensors(layers[:known], rank=2)
    for number in range(foreign):
        tensors[f"lora_unet_foreign_{number}.lora_down.weight"] = torch.zeros(2, 8)
        tensors[f"lora_unet_foreign_{number}.lora_up.weight"] = torch.zeros(8, 2)
    save_tensors(tmp_path / "some.safetensors", tensors)
    report = session.set([("some", 1.0)])
    if not known:
        assert "none of its 722 layers exists in this model" in report.refused[0].reason
        return
    assert (report.applied[0].layers, report.applied[0].unmatched) == (known, foreign)
    assert any(f"{known} of 722 layers exist in this model" in note for note in report.notes) == bool(foreign)


def test_a_file_without_any_lora_tensor_is_refused_with_its_first_keys(session, tmp_path):
    reason = refused(session, tmp_path, {"model.weight": torch.zeros(3), "model.bias": torch.zeros(3)})
    assert "model." in reason


def test_two_layouts_for_one_layer_are_refused_naming_both_keys(session, layers, tmp_path):
    layer = layers[0]
    tensors = lora_tensors([layer], rank=2)
    peft = "unet." + layer.key.removeprefix("unet.")
    tensors[f"{peft}.lora_A.weight"] = torch.zeros(2, *layer.shape[1:])
    tensors[f"{peft}.lora_B.weight"] = torch.zeros(layer.shape[0], 2)
    reason = refused(session, tmp_path, tensors)
    assert f"{peft}.lora_A.weight" in reason or f"{peft}.lora_B.weight" in reason
    assert kohya_name(layer) in reason


def test_a_diffusers_and_an_ldm_spelling_of_one_layer_are_refused(session, layers, tmp_path):
    tensors = lora_tensors(layers, rank=2)
    for role in ("lora_up.weight", "lora_down.weight", "alpha"):
        key = f"lora_unet_down_blocks_1_attentions_0_proj_in.{role}"
        tensors[f"lora_unet_input_blocks_4_1_proj_in.{role}"] = tensors[key]
    assert "two spellings" in refused(session, tmp_path, tensors)


def test_layers_of_rank_zero_change_nothing_and_are_told(session, unet, base, layers, tmp_path):
    tensors = lora_tensors(layers[:5], rank=2)
    name = kohya_name(layers[0])
    tensors[f"{name}.lora_up.weight"] = torch.zeros(8, 0)
    tensors[f"{name}.lora_down.weight"] = torch.zeros(0, *layers[0].shape[1:])
    save_tensors(tmp_path / "empty.safetensors", tensors)
    report = session.set([("empty", 1.0)])
    assert report.applied[0].layers == 4
    assert any("rank 0" in note for note in report.notes)
    assert digest(unet) != base
    assert all(torch.isfinite(tensor).all() for tensor in unet.state_dict().values())


def test_a_file_of_rank_zero_is_refused(session, layers, tmp_path):
    name = kohya_name(layers[0])
    tensors = {f"{name}.lora_up.weight": torch.zeros(8, 0), f"{name}.lora_down.weight": torch.zeros(0, 8)}
    assert "none of its 0 layers" in refused(session, tmp_path, tensors)


def test_dyn_zero_changes_nothing(session, unet, base, layers, tmp_path):
    save_tensors(tmp_path / "dy.safetensors", lora_tensors(layers, rank=4))
    report = session.set("<lora:dy:1:1:0>")
    assert not report.refused
    assert digest(unet) == base


def test_dyn_uses_the_first_ranks(session, unet, layers, tmp_path):
    tensors = lora_tensors(layers, rank=4, alpha=4)
    save_tensors(tmp_path / "dy.safetensors", tensors)
    cut = {
        key: tensor[:, :2] if ".lora_up" in key else tensor[:2] if ".lora_down" in key else torch.tensor(2.0)
        for key, tensor in tensors.items()
    }  # alpha / rank = 1 in both files
    save_tensors(tmp_path / "cut.safetensors", cut)
    session.set("<lora:dy:0.7:0.7:2>")
    sliced = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    session.set("<lora:cut:0.7>")
    assert all(torch.equal(tensor, sliced[name]) for name, tensor in unet.state_dict().items())


def test_a_conv_lora_on_a_linear_layer_of_the_same_size_is_applied(tmp_path):
    """SD1 files have 1x1 convolutions where SD2 and SDXL models have Linear layers, and the other way round."""
    torch.manual_seed(0)
    conv, linear = sd1_unet(), sd1_unet(use_linear_projection=True)
    for source, model in ((conv, linear), (linear, conv)):
        session = LoraSession({"unet": model}, LoraCatalog([tmp_path]))
        keys = {layer.key for layer in session.keymap}
        other = LoraSession({"unet": source}, LoraCatalog([tmp_path]))
        picked = [layer for layer in lierla(other.keymap) if layer.key.endswith("proj_in") and layer.key in keys]
        save_tensors(tmp_path / "p.safetensors", lora_tensors(picked), overwrite=True)
        assert session.set([("p", 1.0)]).applied[0].layers == len(picked) > 0
        session.unload()


def test_c3lier_and_text_encoder_layers_are_applied_together(tmp_path):
    torch.manual_seed(0)
    unet, te = sd1_unet(), text_encoder()
    session = LoraSession({"unet": unet, "te1": te}, LoraCatalog([tmp_path]))
    chosen = c3lier(session.keymap)
    save_tensors(tmp_path / "c.safetensors", lora_tensors(chosen))
    report = session.set([("c", 0.5, 1.0)])
    assert report.applied[0].layers == 278 + 18
    session.set([("c", 0.0, 1.0)])
    assert session.report.layers_restored == 18


def test_a_lora_made_for_unsupported_algorithms_says_so(session, layers, tmp_path):
    name = kohya_name(layers[0])
    reason = refused(
        session, tmp_path, {f"{name}.hada_w1_a": torch.zeros(8, 2), f"{name}.hada_w1_b": torch.zeros(2, 8)}
    )
    assert "no known algorithm" in reason
    assert "hada_w1_a" in reason


def test_strengths_that_are_no_numbers_refuse_that_entry(session, layers, tmp_path):
    save_tensors(tmp_path / "good.safetensors", lora_tensors(layers[:3]))
    report = session.set([("good", math.nan), ("good", 1e30), ("good", 0.5, math.inf), ("good", 0.25)])
    assert len(report.refused) == 3
    assert [lora.unet for lora in report.applied] == [0.25]


def test_metadata_of_peft_gives_alpha(session, unet, layers, tmp_path):
    import json

    tensors = lora_tensors(layers[:2], rank=4, alpha=None)
    meta = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {layers[1].key.removeprefix("unet."): 8}}
    save_tensors(tmp_path / "m.safetensors", tensors, {"lora_adapter_metadata": json.dumps(meta)})
    explicit = lora_tensors(layers[:2], rank=4, alpha=2)
    explicit[f"{kohya_name(layers[1])}.alpha"] = torch.tensor(8.0)
    save_tensors(tmp_path / "e.safetensors", explicit)
    session.set([("m", 1.0)])
    fused = digest(unet)
    session.set([("e", 1.0)])
    assert digest(unet) == fused
