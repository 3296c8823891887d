"""Every layer name kohya writes for SD1, SD2 and SDXL finds its layer, whoever built the model."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from lib_lora.core.keymap import KeyMap
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import split_key
from tests.fullsize import (
    FAMILIES,
    LDM_COMPONENTS,
    TEXT_ENCODERS,
    UNET_PREFIX,
    diffusers_model,
    facts,
    kohya_shapes,
    ldm_modules,
    shapes,
    single_file,
    to_sgm,
)

COUNTS = {"sd1": (264, 350), "sd2": (330, 416), "sdxl": (986, 1052)}
SDXL_UNET_LIERLA = 722
BASE_MODELS = {"sd1": BaseModel.SD1, "sd2": BaseModel.SD2, "sdxl": BaseModel.SDXL}
BUILDERS = {
    "diffusers modules": lambda family: KeyMap.from_modules(diffusers_model(family)),
    "diffusers folder": lambda family: KeyMap.from_components(
        {name: shapes(module) for name, module in diffusers_model(family).items()}
    ),
    "single file": lambda family: KeyMap.from_checkpoint(single_file(family)),
    "LDM modules": lambda family: KeyMap.from_modules(ldm_modules(family)),
}
TINY = Path(__file__).parent / "sd1"


@cache
def keymap(builder: str, family: str) -> KeyMap:
    return BUILDERS[builder](family)


def found(keys: KeyMap, name: str):
    parts = split_key(f"{name}.lora_down.weight")
    assert parts is not None
    return keys.find(parts.layer)


every_model = pytest.mark.parametrize(
    ("builder", "family"), [(builder, family) for builder in BUILDERS for family in FAMILIES]
)


@every_model
def test_every_name_of_kohya_finds_a_layer_of_the_right_shape(builder, family):
    keys = keymap(builder, family)
    names = kohya_shapes(family)
    resolved = {name: list(layer.shape) for name in names if (layer := found(keys, name))}
    assert resolved == names
    assert len(resolved) == COUNTS[family][1]


@every_model
def test_every_name_leads_to_a_layer_of_its_own(builder, family):
    keys = keymap(builder, family)
    layers = [found(keys, name) for name in facts(f"{family}_lora_names")["lierla"]]
    assert len({layer.key for layer in layers}) == len(layers) == COUNTS[family][0]


@every_model
def test_the_family_of_every_model_is_recognised(builder, family):
    assert keymap(builder, family).base_model is BASE_MODELS[family]


@every_model
def test_the_same_layers_have_the_same_keys_and_blocks_whoever_built_the_model(builder, family):
    here, reference = keymap(builder, family), keymap("diffusers modules", family)
    assert {layer.key: (layer.block, layer.component) for layer in here if _shared(layer)} == {
        layer.key: (layer.block, layer.component) for layer in reference if _shared(layer)
    }


def _shared(layer) -> bool:
    """open_clip's position embedding is a bare parameter, no layer."""
    return not layer.key.endswith("position_embedding")


@every_model
def test_every_weight_of_the_model_is_a_layer_and_a_fused_one_is_three(builder, family):
    names = [name for name in single_file(family) if name.endswith(".weight") and "position_embedding" not in name]
    fused = [name for name in single_file(family) if name.endswith("in_proj_weight")]
    assert len([layer for layer in keymap(builder, family) if _shared(layer)]) == len(names) + 3 * len(fused)


def test_sdxl_has_its_722_lierla_layers_in_the_unet():
    names = [name for name in facts("sdxl_lora_names")["lierla"] if name.startswith("lora_unet_")]
    layers = {layer.key for name in names if (layer := found(keymap("diffusers modules", "sdxl"), name))}
    assert len(layers) == SDXL_UNET_LIERLA


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_ldm_and_diffusers_spelling_of_a_unet_layer_lead_to_one_layer(builder, family):
    keys = keymap(builder, family)
    for diffusers, entry in facts(f"{family}_unet_diffusers_to_ldm").items():
        if diffusers.endswith(".weight"):
            theirs = found(keys, "lora_unet_" + entry["ldm"].removesuffix(".weight").replace(".", "_"))
            ours = found(keys, f"unet.{diffusers.removesuffix('.weight')}")
            assert ours is not None, diffusers
            assert theirs is ours
            assert ours.key == f"unet.{diffusers.removesuffix('.weight')}"


@pytest.mark.parametrize("builder", BUILDERS)
def test_sgm_and_diffusers_spelling_of_an_sdxl_layer_lead_to_one_layer(builder):
    keys, prefixes = keymap(builder, "sdxl"), facts("sdxl_diffusers_to_sgm_prefix")
    for name in shapes(diffusers_model("sdxl")["unet"]):
        if name.endswith(".weight"):
            ours = found(keys, f"unet.{name.removesuffix('.weight')}")
            assert ours is not None, name
            assert found(keys, "lora_unet_" + to_sgm(name, prefixes).removesuffix(".weight").replace(".", "_")) is ours


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_of_a_checkpoint_says_the_key_and_the_rows_of_its_weight(family):
    file = single_file(family)
    for layer in keymap("single file", family):
        stored = file[layer.parameter]
        first, last = layer.rows or (0, stored[0])
        assert layer.shape == (last - first, *stored[1:])
        assert layer.module is None


@pytest.mark.parametrize("builder", ["diffusers modules", "LDM modules"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_of_a_live_model_holds_its_parameter(builder, family):
    components = diffusers_model(family) if builder == "diffusers modules" else None
    for layer in keymap(builder, family):
        assert tuple(layer.live().shape) == layer.shape
        if components:
            assert components[layer.component].get_parameter(layer.parameter) is layer.weight()


@pytest.mark.parametrize("builder", ["single file", "LDM modules"])
@pytest.mark.parametrize(("family", "component"), [("sd2", "te1"), ("sdxl", "te2")])
def test_open_clip_keeps_q_k_and_v_in_the_thirds_of_one_weight(builder, family, component):
    width = TEXT_ENCODERS[family][component]["hidden_size"]
    layers = [
        found(keymap(builder, family), f"lora_{component}_text_model_encoder_layers_7_self_attn_{letter}_proj")
        for letter in "qkv"
    ]
    assert [layer.rows for layer in layers] == [(0, width), (width, 2 * width), (2 * width, 3 * width)]
    assert {layer.attribute for layer in layers} == {"in_proj_weight"}
    assert len({layer.parameter for layer in layers}) == 1


@pytest.mark.parametrize("builder", ["single file", "LDM modules"])
def test_open_clips_own_layer_names_are_found(builder):
    keys = keymap(builder, "sdxl")
    for theirs, ours in (("attn_out_proj", "self_attn_out_proj"), ("mlp_c_fc", "mlp_fc1"), ("mlp_c_proj", "mlp_fc2")):
        layer = found(keys, f"lora_te2_text_model_encoder_layers_31_{ours}")
        assert layer is not None
        assert found(keys, f"lora_te2_transformer_resblocks_31_{theirs}") is layer


def test_the_tiny_checkpoint_of_the_golden_files_has_every_unet_layer():
    names = json.loads((TINY / "ldm_to_diffusers_unet_keys.json").read_text())
    full = {entry["ldm"]: entry["shape_ldm"] for entry in facts("sd1_unet_diffusers_to_ldm").values()}
    keys = KeyMap.from_checkpoint({UNET_PREFIX + ldm: full[ldm] for ldm in names})
    expected = {f"unet.{name.removesuffix('.weight')}" for name in names.values() if name.endswith(".weight")}
    assert {layer.key for layer in keys} == expected


@pytest.mark.parametrize("builder", BUILDERS)
def test_sd1_blocks_are_those_of_the_block_weight_extension(builder):
    index = facts("block_index")
    names = ["M00" if name == "MID" else name for name in index["lbw_names"]]
    blocks = {name: found(keymap(builder, "sd1"), name).block for name in kohya_shapes("sd1")}
    known = {name: names[number] for name, number in index["sd1_lbw_index"].items()}
    shared = blocks.keys() & known.keys()
    assert {name: blocks[name] for name in shared} == {name: known[name] for name in shared}
    assert len(shared) > 250


@pytest.mark.parametrize("builder", BUILDERS)
def test_sdxl_blocks_are_the_numbers_in_the_sgm_names(builder):
    index = facts("block_index")
    names = ["M00" if name == "MID" else name for name in index["lbw_names"]]
    numbered = re.compile(r"lora_unet_(?:input|output)_blocks_\d+_|lora_unet_middle_block_")
    known = {
        match[0]: names[number] for name, number in index["sdxl_lbw_index"].items() if (match := numbered.match(name))
    }
    layers = {name: found(keymap(builder, "sdxl"), name) for name in kohya_shapes("sdxl")}
    unet = {name: layer.block for name, layer in layers.items() if layer.component == "unet"}
    assert unet == {name: known[numbered.match(name)[0]] for name in unet}
    assert {layer.block for layer in layers.values() if layer.component != "unet"} == {"BASE"}


@every_model
def test_the_first_convolution_is_in_the_first_block_and_embeddings_are_in_none(builder, family):
    blocks = {layer.key: layer.block for layer in keymap(builder, family)}
    assert blocks["unet.conv_in"] == "IN00"
    outside = ["unet.conv_out", "unet.conv_norm_out", "unet.time_embedding.linear_1", "unet.time_embedding.linear_2"]
    outside += ["unet.add_embedding.linear_1", "unet.add_embedding.linear_2"] if family == "sdxl" else []
    assert {blocks[key] for key in outside} == {""}
    assert set(keymap(builder, family).components) == set(LDM_COMPONENTS[family])
