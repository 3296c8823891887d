"""Names of layers in LoRA files of kohya and PEFT, against kohya's own lists and the modules of diffusers."""

from __future__ import annotations

import pytest

from lib_lora.core.keymap import KeyMap
from lib_lora.core.lora_names import dotted_name, kohya_name, peft_name
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import split_key
from lib_lora.errors import NamingError
from tests.fullsize import FAMILIES, diffusers_model, facts, kohya_shapes, shapes, single_file, to_sgm

BASE_MODELS = {"sd1": BaseModel.SD1, "sd2": BaseModel.SD2, "sdxl": BaseModel.SDXL}
COUNTS = {"sd1": 350, "sd2": 416, "sdxl": 1052}
PEFT_COMPONENTS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}

every_family = pytest.mark.parametrize("family", FAMILIES)


def layer_of(key: str) -> str:
    """The layer that a file's key means."""
    parts = split_key(f"{key}.lora_down.weight")
    assert parts is not None
    return parts.layer


def weight_shape(family: str, dotted: str) -> list[int]:
    """Shape of a layer's weight in diffusers' and transformers' own module."""
    component, _, path = dotted.partition(".")
    weights = shapes(diffusers_model(family)[component])
    name = f"{path}.weight"
    return list(weights[name] if name in weights else weights[name.removeprefix("text_model.")])


@every_family
def test_every_name_of_kohya_becomes_the_dotted_path_of_that_layer_and_itself_again(family):
    base_model, names = BASE_MODELS[family], kohya_shapes(family)
    dotted = {name: dotted_name(layer_of(name), base_model) for name in names}
    assert {name: weight_shape(family, path) for name, path in dotted.items()} == names
    assert {name: kohya_name(path, base_model) for name, path in dotted.items()} == {name: name for name in names}
    assert len(set(dotted.values())) == len(names) == COUNTS[family]


@every_family
def test_every_name_of_kohya_becomes_a_path_of_the_pipeline_and_itself_again(family):
    base_model, names = BASE_MODELS[family], kohya_shapes(family)
    peft = {name: peft_name(layer_of(name), base_model) for name in names}
    for name, path in peft.items():
        component, _, rest = path.partition(".")
        assert weight_shape(family, f"{PEFT_COMPONENTS[component]}.{rest}") == names[name]
    assert {name: kohya_name(layer_of(path), base_model) for name, path in peft.items()} == {n: n for n in names}


@every_family
def test_every_layer_of_a_checkpoint_has_a_name_in_both_layouts_that_leads_back(family):
    base_model = BASE_MODELS[family]
    for layer in KeyMap.from_checkpoint(single_file(family)):
        if "position_embedding" in layer.key:
            continue
        assert dotted_name(layer.key, base_model) == layer.key
        for name in (kohya_name, peft_name):
            assert dotted_name(layer_of(name(layer.key, base_model)), base_model) == layer.key


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_ldm_names_of_every_unet_layer_lead_to_the_path_in_diffusers(family):
    for diffusers, entry in facts(f"{family}_unet_diffusers_to_ldm").items():
        ldm = entry["ldm"].rpartition(".")[0]
        layer = layer_of(f"lora_unet_{ldm.replace('.', '_')}")
        assert dotted_name(layer, BASE_MODELS[family]) == f"unet.{diffusers.rpartition('.')[0]}"


def test_sgm_names_of_every_unet_layer_of_sdxl_lead_to_the_path_in_diffusers_and_back():
    prefixes = facts("sdxl_diffusers_to_sgm_prefix")
    for name in shapes(diffusers_model("sdxl")["unet"]):
        path = name.rpartition(".")[0]
        flat = f"lora_unet_{to_sgm(name, prefixes).rpartition('.')[0].replace('.', '_')}"
        assert dotted_name(layer_of(flat), BaseModel.SDXL) == f"unet.{path}"
        assert kohya_name(f"unet.{path}", BaseModel.SDXL) == flat


@pytest.mark.parametrize(
    ("flat", "path"),
    [
        ("lora_te2_transformer_resblocks_31_attn_out_proj", "te2.text_model.encoder.layers.31.self_attn.out_proj"),
        ("lora_te2_transformer_resblocks_0_mlp_c_fc", "te2.text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_2.text_projection", "te2.text_projection"),
    ],
)
def test_names_of_open_clip_lead_to_the_path_in_transformers(flat, path):
    assert dotted_name(layer_of(flat), BaseModel.SDXL) == path


@pytest.mark.parametrize(
    "layer",
    [
        "unet:down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q",
        "unet:down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q_extra",
        "unet:down_blocks_x_attentions_0_proj_in",
        "unet:input_blocks_4_1_proj_in_1",
        "unet:input_blocks_77_1_proj_in",
        "unet:middle_block_1",
        "unet:down_blocks_#_attentions_0_proj_in",
        "unet:down_blocks_01_attentions_0_proj_in",
        "unet:#",
        "unet:",
        "te1:encoder_layers_0_self_attn_in_proj",
        "te2:encoder_layers_0_mlp_fc1",
        "te3:encoder_block_0_layer_0_SelfAttention_q",
        "",
    ],
)
@pytest.mark.parametrize("name", [dotted_name, kohya_name, peft_name])
def test_what_the_family_has_not_is_refused_with_its_name(name, layer):
    with pytest.raises(NamingError, match=r"SD 1\.x has no layer named") as raised:
        name(layer, BaseModel.SD1)
    assert layer in str(raised.value)


@pytest.mark.parametrize("family", [BaseModel.SD3, BaseModel.FLUX, BaseModel.UNKNOWN])
def test_other_families_are_refused_by_name(family):
    with pytest.raises(NamingError, match=family.value):
        kohya_name("unet:conv_in", family)
