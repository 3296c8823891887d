"""SD3 and Flux: every layer found in diffusers' and the original structure, by the names of either."""

from __future__ import annotations

import pytest
import torch

from lib_lora.core.keymap import KeyMap
from lib_lora.core.models import BaseModel
from tests.transformer_layers import (
    BASE_MODELS,
    BLOCKS,
    FAMILIES,
    FLUX_WIDTH,
    WIDTH,
    converted,
    diffusers,
    keymap,
    layer_name,
    original,
    original_shapes,
    rows_of,
)
from tests.transformer_models import checkpoint_shapes, flux, flux_shapes, linears, sd3_shapes

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_names_reach_the_rows_of_a_checkpoint_that_diffusers_own_converter_takes(family):
    tensors, theirs = converted(family)
    shapes = checkpoint_shapes(original_shapes(family, FLUX_WIDTH if family == "flux" else WIDTH))
    keymap = KeyMap.from_checkpoint(shapes)
    assert keymap.base_model is BASE_MODELS[family]
    checked = 0
    for name, expected in theirs.items():
        path, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias") or ".norm_" in name:
            continue
        (part,) = keymap.parts(layer_name(f"transformer.{path}") + (".bias" if kind == "bias" else ""))
        own = tensors[part.layer.parameter]
        own = own if part.layer.rows is None else own[slice(*part.layer.rows)]
        assert torch.equal(own, rows_of(expected, part.rows)), name
        checked += 1
    assert checked == 2 * len(linears(diffusers(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_original_names_are_divided_among_the_layers_of_diffusers_as_its_own_converter_does(family):
    tensors, theirs = converted(family)
    with torch.device("meta"):
        model = flux(heads=24, size=128) if family == "flux" else diffusers(family)
    keymap = KeyMap.from_modules({"transformer": model})
    reached = set()
    for name, own in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "scale":
            continue
        for part in keymap.parts(layer_name(f"diffusion_model.{path}") + (".bias" if kind == "bias" else "")):
            assert torch.equal(theirs[part.layer.parameter], rows_of(own, part.rows)), name
            reached.add(part.layer.parameter)
    assert reached == {f"{name}.{kind}" for name in linears(model) for kind in ("weight", "bias")}


@pytest.mark.parametrize("structure", ["diffusers", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_found_by_all_names_that_trainers_give_it(family, structure):
    model = keymap(family, structure)
    assert model.base_model is BASE_MODELS[family]
    for name in linears(diffusers(family)):
        flat = name.replace(".", "_")
        spelled = [f"transformer.{name}", f"lora_transformer_{flat}", f"lora_unet_{flat}", f"lycoris_{flat}", name]
        found = {tuple(model.parts(layer_name(spelling))) for spelling in spelled}
        assert len(found) == 1, name
        assert len(found.pop()) == 1, name
    for name in linears(original(family)):
        flat = name.replace(".", "_")
        spelled = [f"lora_unet_{flat}", f"diffusion_model.{name}", f"model.diffusion_model.{name}", name]
        found = {tuple(model.parts(layer_name(spelling))) for spelling in spelled}
        assert len(found) == 1, name
        assert found.pop(), name


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("component", ["unet", "transformer"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_the_original_structure_is_known_under_any_prefix_and_as_any_component(family, component, prefix):
    shapes = checkpoint_shapes(original_shapes(family), prefix)
    model = KeyMap.from_components({component: shapes})
    layer = model.find("transformer:transformer_blocks_0_attn_to_k")
    assert layer.rows == (WIDTH, 2 * WIDTH)
    assert layer.shape == (WIDTH, WIDTH)
    assert layer.key == f"{component}.transformer_blocks.0.attn.to_k"
    assert layer.parameter == f"{prefix}{BLOCKS[family]}.qkv.weight"


def test_the_rows_of_fluxs_linear1_are_q_k_v_and_the_mlp():
    model = keymap("flux", "original")
    names = ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp")
    layers = [model.find(f"transformer:single_transformer_blocks_1_{name}") for name in names]
    assert [layer.rows for layer in layers] == [(0, 32), (32, 64), (64, 96), (96, 224)]
    assert {layer.parameter for layer in layers} == {"single_blocks.1.linear1.weight"}
    biases = [model.find(f"transformer:single_transformer_blocks_1_{name}.bias") for name in names]
    assert [bias.rows for bias in biases] == [(0, 32), (32, 64), (64, 96), (96, 224)]
    assert model.find("transformer:single_transformer_blocks_1_proj_out").parameter == "single_blocks.1.linear2.weight"


def test_flux_schnell_has_no_guidance_and_everything_else():
    model = KeyMap.from_checkpoint(checkpoint_shapes(flux_shapes(WIDTH, guidance=False)))
    assert model.base_model is BaseModel.FLUX
    assert model.parts("unet:guidance_in_in_layer") == ()
    assert model.find("transformer:time_text_embed_text_embedder_linear_1").parameter == "vector_in.in_layer.weight"


def test_text_encoders_of_an_sd3_checkpoint_are_three_components():
    model = KeyMap.from_checkpoint(
        checkpoint_shapes(sd3_shapes(WIDTH), "model.diffusion_model.")
        | {
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (5120, 1280),
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
            "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
        }
    )
    assert model.components == ("unet", "te1", "te2", "te3")
    assert model.base_model is BaseModel.SD3
    assert model.find("te1:encoder_layers_0_mlp_fc1").shape == (3072, 768)
    assert model.find("te2:encoder_layers_0_mlp_fc1").shape == (5120, 1280)
    assert model.find("te3:encoder_block_0_layer_0_SelfAttention_q").shape == (4096, 4096)


@pytest.mark.parametrize("component", ["te2", "te3"])
@pytest.mark.parametrize("spelled", ["lora_te3_", "lora_te2_", "text_encoder_2.", "text_encoders.t5xxl.transformer."])
def test_t5_is_found_as_the_second_and_as_the_third_text_encoder(component, spelled):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = KeyMap.from_modules({component: T5EncoderModel(config)})
    path = "encoder.block.0.layer.0.SelfAttention.q"
    layer = model.find(layer_name(spelled + (path if spelled.endswith(".") else path.replace(".", "_"))))
    assert layer.key == f"{component}.{path}"


def test_blocks_of_flux_have_the_names_that_block_weights_give_them():
    blocks = {layer.key: layer.block for layer in keymap("flux", "diffusers")}
    assert blocks["transformer.transformer_blocks.1.ff.net.2"] == "D01"
    assert blocks["transformer.single_transformer_blocks.0.attn.to_q"] == "S00"
    assert (blocks["transformer.x_embedder"], blocks["transformer.proj_out"]) == ("IN", "OUT")
    by_parameter = {layer.parameter: layer.block for layer in keymap("flux", "original")}
    assert by_parameter["single_blocks.1.linear1.weight"] == "S01"
    assert by_parameter["final_layer.adaLN_modulation.1.weight"] == "OUT"
