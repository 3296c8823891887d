"""LoRAs in the weights of ControlNets: which files act there, and what they make of them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.core.keymap import KeyMap
from lib_lora.core.lora_names import dotted_name, kohya_name, peft_name
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import split_key
from lib_lora.core.saving import save_tensors
from lib_lora.pipelines import denoisers, pipeline_components
from tests.controlnets import controlnet_lora, controlnet_of
from tests.toys import digest, exact_sum, is_lierla, lora_tensors, sd1_unet, sdxl_unet

STRENGTH = 0.8
FP32_ROUNDING = 1e-6  # relative to the largest weight


class Pipe:
    """Has what a pipeline of diffusers has."""

    def __init__(self, unet, *controlnets) -> None:
        self.unet = unet
        if len(controlnets) > 1:
            from diffusers import MultiControlNetModel

            self.controlnet = MultiControlNetModel(controlnets)
        elif controlnets:
            self.controlnet = controlnets[0]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    unet = sd1_unet()
    return unet, controlnet_of(unet, 1), controlnet_of(unet, 2)


@pytest.fixture(scope="module")
def layers(models):
    """The layers of the UNet that LoRAs are trained for and a ControlNet has a copy of."""
    keymap = KeyMap.from_modules({"unet": models[0]})
    return [layer for layer in keymap if is_lierla(layer) and not layer.key.startswith("unet.up_blocks")]


@pytest.fixture
def folder(tmp_path, layers):
    save_tensors(tmp_path / "first.safetensors", controlnet_lora(layers, seed=1))
    save_tensors(tmp_path / "second.safetensors", controlnet_lora(layers, "controlnet_2", seed=2))
    save_tensors(tmp_path / "style.safetensors", lora_tensors(layers, seed=3))
    both = {**lora_tensors(layers, seed=4), **controlnet_lora(layers[:3], seed=5)}
    save_tensors(tmp_path / "both.safetensors", both)
    return tmp_path


def session_of(folder, *models, **options):
    return LoraSession(pipeline_components(Pipe(*models)), LoraCatalog([folder]), **options)


def worst(model, base, layers, *parts) -> float:
    """Largest difference to base + Σ strength · ΔW in float64, relative to the largest weight."""
    now, before = dict(model.named_parameters()), dict(base.named_parameters())
    named = {f"{layer.key.partition('.')[2]}.weight": layer for layer in layers}
    errors = [0.0]
    for name, weight in now.items():
        expected = before[name].double()
        if name in named:
            flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            expected = exact_sum(before[name], flat, parts)
        errors.append(((weight.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item())
    return max(errors)


def named_for_unet(tensors):
    """The same tensors under the names that `exact_sum` looks for."""
    return {f"lora_unet_{key.partition('controlnet_')[2].removeprefix('2_')}": value for key, value in tensors.items()}


def test_components_of_a_pipeline_are_its_controlnets_in_order(models):
    assert list(pipeline_components(Pipe(models[0]))) == ["unet"]
    assert list(pipeline_components(Pipe(*models[:2]))) == ["unet", "controlnet"]
    both = pipeline_components(Pipe(*models))
    assert (both["controlnet"], both["controlnet_2"]) == models[1:]
    assert list(denoisers({"unet": models[0], "te1": models[0], "controlnet": models[1]})) == ["unet", "controlnet"]


def test_keys_that_name_a_controlnet_mean_its_layers_in_every_layout(models):
    keymap = KeyMap.from_modules(pipeline_components(Pipe(*models)))
    flat, dotted = "down_blocks_0_attentions_0_proj_in", "down_blocks.0.attentions.0.proj_in"
    spellings = {
        "controlnet": (f"lora_controlnet_{flat}.lora_up.weight", f"controlnet.{dotted}.lora_A.weight"),
        "controlnet_2": (f"lora_controlnet_2_{flat}.alpha", f"controlnet_2.{dotted}.lora_B.default.weight"),
        "unet": (f"lora_unet_{flat}.lora_up.weight", f"unet.{dotted}.lora_A.weight", f"{dotted}.lora_A.weight"),
    }
    for component, keys in spellings.items():
        for key in keys:
            assert keymap.find(split_key(key).layer).key == f"{component}.{dotted}"
    original = keymap.find(split_key("lora_controlnet_input_blocks_1_1_proj_in.lora_up.weight").layer)
    assert original.key == f"controlnet.{dotted}"
    own = keymap.find(split_key("controlnet.controlnet_down_blocks.0.lora_A.weight").layer)
    assert own.key == "controlnet.controlnet_down_blocks.0"
    assert keymap.base_model is KeyMap.from_modules({"unet": models[0]}).base_model


def test_a_controlnets_layers_have_the_blocks_of_the_unets_they_copy(models):
    keymap = KeyMap.from_modules(pipeline_components(Pipe(*models[:2])))
    blocks = {layer.key: layer.block for layer in keymap}
    copies = {key: block for key, block in blocks.items() if key.startswith("controlnet.") and block}
    assert len(copies) > 100
    assert all(block == blocks[key.replace("controlnet.", "unet.", 1)] for key, block in copies.items())
    assert {*copies.values()} == {*(f"IN{number:02d}" for number in range(12)), "M00"}


def test_a_lora_of_a_controlnet_changes_that_alone_exactly_and_is_taken_back_bit_for_bit(models, folder, layers):
    before, base = [digest(model) for model in models], [copy.deepcopy(model) for model in models]
    session = session_of(folder, *models)
    report = session.set([("first", STRENGTH), ("second", -STRENGTH)])
    assert [lora.control_layers for lora in report.applied] == [len(layers)] * 2
    assert f"({len(layers)} in the ControlNet)" in str(report)
    assert (report.refused, report.layers_written) == ((), 2 * len(layers))
    assert digest(models[0]) == before[0]
    first = (named_for_unet(controlnet_lora(layers, seed=1)), STRENGTH)
    second = (named_for_unet(controlnet_lora(layers, "controlnet_2", seed=2)), -STRENGTH)
    assert worst(models[1], base[1], layers, first) < FP32_ROUNDING
    assert worst(models[2], base[2], layers, second) < FP32_ROUNDING
    keys = {session.applied_key}
    for request in ([("first", STRENGTH)], [("second", -STRENGTH)], [("first", 0.7)]):
        session.set(request)
        keys.add(session.applied_key)
    assert len(keys) == 4
    session.unload()
    assert [digest(model) for model in models] == before


def test_a_lora_of_the_unet_leaves_a_controlnet_alone_unless_it_is_to_follow(models, folder, layers):
    unet, control, _ = models
    before, base = digest(control), copy.deepcopy(control)
    session = session_of(folder, unet, control)
    assert session.set([("style", STRENGTH)]).layers_written == len(layers)
    assert digest(control) == before
    session.unload()
    session = session_of(folder, unet, control, control_follows=True)
    report = session.set([("style", STRENGTH)])
    assert (report.layers_written, report.applied[0].control_layers) == (2 * len(layers), len(layers))
    assert worst(control, base, layers, (lora_tensors(layers, seed=3), STRENGTH)) < FP32_ROUNDING
    session.unload()
    assert digest(control) == before


def test_what_a_file_says_of_a_controlnet_itself_goes_before_what_follows_from_the_unet(models, folder, layers):
    unet, control, _ = models
    base = copy.deepcopy(control)
    session = session_of(folder, unet, control, control_follows=True)
    session.set([("both", STRENGTH)])
    expected = {**lora_tensors(layers, seed=4), **named_for_unet(controlnet_lora(layers[:3], seed=5))}
    assert worst(control, base, layers, (expected, STRENGTH)) < FP32_ROUNDING
    session.unload()


def test_a_layer_of_another_shape_than_the_unets_does_not_follow(layers):
    torch.manual_seed(0)
    unet = sd1_unet(in_channels=9)
    components = {"unet": unet, "controlnet": controlnet_of(sd1_unet())}
    keymap = KeyMap.from_modules(components, control_follows=True)
    assert [part.layer.key for part in keymap.parts("unet:conv_in")] == ["unet.conv_in"]
    assert [part.layer.component for part in keymap.parts("unet:conv_in.bias")] == ["unet", "controlnet"]


def test_block_weights_and_hook_mode_reach_a_controlnet(models, folder, layers):
    unet, control, _ = models
    session = session_of(folder, unet, control)
    base = copy.deepcopy(control)
    weights = "lbw=0," + ",".join("1" if number < 3 else "0" for number in range(16))
    session.set(f"<lora:first:{STRENGTH}:{weights}>")
    early = [layer for layer in layers if layer.block in ("IN01", "IN02", "IN04")]
    assert worst(control, base, early, (named_for_unet(controlnet_lora(layers, seed=1)), STRENGTH)) < FP32_ROUNDING
    session.mode = "hook"
    assert session.set([("first", STRENGTH)]).layers_written == len(layers)
    hooked = _answer(control)
    session.mode = "prefuse"
    session.set([("first", STRENGTH)])
    assert torch.allclose(_answer(control), hooked, rtol=0, atol=1e-5 * float(hooked.abs().max()))
    session.unload()


@torch.no_grad()
def _answer(control):
    """What a ControlNet gives for the UNet's middle block."""
    torch.manual_seed(3)
    latent, context, image = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32), torch.rand(1, 3, 64, 64)
    return control(latent, torch.tensor(500), context, image, return_dict=False)[1]


@pytest.mark.newest
def test_a_lora_that_peft_saved_of_a_controlnet_merges_as_peft_merges_it(models, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    control = copy.deepcopy(models[1])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "proj_in", "conv1"], init_lora_weights=False)
    torch.manual_seed(5)
    inject_adapter_in_model(config, control)
    tensors = get_peft_model_state_dict(control)
    alphas = {f"controlnet.{key.replace('.lora_A.weight', '.alpha')}": torch.tensor(8.0) for key in tensors}
    alphas = {key: value for key, value in alphas.items() if key.endswith(".alpha")}
    named = {f"controlnet.{key}": tensor.clone() for key, tensor in tensors.items()}
    save_tensors(tmp_path / "trained.safetensors", {**named, **alphas})
    for module in [*control.modules()]:
        if hasattr(module, "merge"):
            module.merge()
    expected = {name.replace(".base_layer", ""): weight for name, weight in control.named_parameters()}
    session = session_of(tmp_path, *models[:2])
    report = session.set([("trained", 1.0)])
    assert report.applied[0].unmatched == 0
    changed = dict(models[1].named_parameters())
    for name, weight in changed.items():
        assert torch.allclose(weight, expected[name], rtol=0, atol=2e-6 * float(weight.abs().max())), name
    session.unload()


def test_a_controlnets_lora_of_another_family_or_without_a_controlnet_is_refused_by_a_sentence(
    models, folder, tmp_path
):
    assert "none of its" in session_of(folder, models[0]).set([("first", 1)]).refused[0].reason
    xl = KeyMap.from_modules({"unet": sdxl_unet()})
    deep = [layer for layer in xl if ".down_blocks.2.attentions.0.transformer_blocks.9.attn1" in layer.key]
    save_tensors(tmp_path / "xl.safetensors", controlnet_lora(deep))
    wide = "lora_controlnet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {f"{wide}.lora_down.weight": torch.ones(2, 1024), f"{wide}.lora_up.weight": torch.ones(320, 2)}
    save_tensors(tmp_path / "sd2.safetensors", factors)
    components = {"unet": _wide_unet(), "controlnet": models[1]}
    report = LoraSession(components, LoraCatalog([tmp_path])).set([("xl", 1), ("sd2", 1)])
    assert [refused.reason for refused in report.refused] == [
        "xl was made for SDXL, this model is SD 1.x",
        "sd2 was made for SD 2.x, this model is SD 1.x",
    ]


def _wide_unet():
    return sd1_unet(cross_attention_dim=768, block_out_channels=(8, 8, 8, 8))


def test_names_of_a_controlnets_layers_are_converted_between_kohya_and_diffusers():
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    for family, number in itertools.product((BaseModel.SD1, BaseModel.SDXL), ("", "_2")):
        layer = f"controlnet{number}:{path.replace('.', '_')}"
        assert dotted_name(layer, family) == peft_name(layer, family) == f"controlnet{number}.{path}"
        assert kohya_name(layer, family) == f"lora_controlnet{number}_{path.replace('.', '_')}"
        assert split_key(f"{kohya_name(layer, family)}.alpha").layer == layer
