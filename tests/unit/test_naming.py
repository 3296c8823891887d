"""Keys of LoRA files, as the trainers and libraries in the field write them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_lora.core.naming import KeyParts, layer_name, split_embedding, split_key

TO_Q = "unet:down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TO_OUT = "unet:down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
LDM_TO_Q = "unet:input_blocks_1_1_transformer_blocks_0_attn1_to_q"
Q_PROJ = "te1:encoder_layers_0_self_attn_q_proj"
Q_PROJ_2 = "te2:encoder_layers_0_self_attn_q_proj"

FLAT_TO_Q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED_ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
DOTTED_Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"
FLAT_Q_PROJ = "text_model_encoder_layers_0_self_attn_q_proj"

LAYERS = {
    # kohya
    f"lora_unet_{FLAT_TO_Q}": (TO_Q, "kohya"),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": (LDM_TO_Q, "kohya"),
    f"lora_unet__orig_mod_{FLAT_TO_Q}": (TO_Q, "kohya"),
    f"lora_te_{FLAT_Q_PROJ}": (Q_PROJ, "kohya"),
    f"lora_te1_{FLAT_Q_PROJ}": (Q_PROJ, "kohya"),
    f"lora_te2_{FLAT_Q_PROJ}": (Q_PROJ_2, "kohya"),
    "lora_te2_encoder_layers_0_self_attn_q_proj": (Q_PROJ_2, "kohya"),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": ("te3:encoder_block_0_layer_0_SelfAttention_q", "kohya"),
    "lora_transformer_transformer_blocks_0_attn_to_q": ("transformer:transformer_blocks_0_attn_to_q", "kohya"),
    # LyCORIS
    f"lycoris_{FLAT_TO_Q}": (TO_Q, "lycoris"),
    f"lycoris_unet_{FLAT_TO_Q}": (TO_Q, "lycoris"),
    f"lycoris_{FLAT_Q_PROJ}": (Q_PROJ, "lycoris"),
    # diffusers
    f"unet.{DOTTED_ATTN}.to_q": (TO_Q, "diffusers"),
    f"unet._orig_mod.{DOTTED_ATTN}.to_q": (TO_Q, "diffusers"),
    f"text_encoder.{DOTTED_Q_PROJ}": (Q_PROJ, "diffusers"),
    "text_encoder.encoder.layers.0.self_attn.q_proj": (Q_PROJ, "diffusers"),
    f"text_encoder_2.{DOTTED_Q_PROJ}": (Q_PROJ_2, "diffusers"),
    "transformer.single_transformer_blocks.0.attn.to_q": (
        "transformer:single_transformer_blocks_0_attn_to_q",
        "diffusers",
    ),
    # PEFT
    f"base_model.model.{DOTTED_ATTN}.to_q": (TO_Q, "peft"),
    f"base_model.model.unet.{DOTTED_ATTN}.to_q": (TO_Q, "peft"),
    f"base_model.model.{DOTTED_Q_PROJ}": (Q_PROJ, "peft"),
    "base_model.model.encoder.layers.0.self_attn.q_proj": (Q_PROJ, "peft"),
    # without a component
    f"{DOTTED_ATTN}.to_q": (TO_Q, "bare"),
    DOTTED_Q_PROJ: (Q_PROJ, "bare"),
    "transformer.resblocks.0.attn.out_proj": ("te1:transformer_resblocks_0_attn_out_proj", "bare"),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": (LDM_TO_Q, "bare"),
    "double_blocks.0.img_attn.qkv": ("unet:double_blocks_0_img_attn_qkv", "bare"),
    # checkpoint names
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": (LDM_TO_Q, "ldm"),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": (LDM_TO_Q, "ldm"),
    f"cond_stage_model.transformer.{DOTTED_Q_PROJ}": (Q_PROJ, "ldm"),
    f"text_encoders.clip_l.transformer.{DOTTED_Q_PROJ}": (Q_PROJ, "ldm"),
    f"text_encoders.clip_g.transformer.{DOTTED_Q_PROJ}": (Q_PROJ_2, "ldm"),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": (
        "te3:encoder_block_0_layer_0_SelfAttention_q",
        "ldm",
    ),
    f"conditioner.embedders.0.transformer.{DOTTED_Q_PROJ}": (Q_PROJ, "ldm"),
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc": (
        "te2:transformer_resblocks_0_mlp_c_fc",
        "ldm",
    ),
}

ROLES = {
    "lora_up.weight": "lora_up",
    "lora_down.weight": "lora_down",
    "lora_mid.weight": "lora_mid",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "scale": "scale",
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_A.default.weight": "lora_down",
    "lora_B.default.weight": "lora_up",
    "lora_A.my-style_2.weight": "lora_down",
    "lora_A.lora_A.weight": "lora_down",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    "lora.down.weight": "lora_down",
    "lora.up.weight": "lora_up",
    "lora_linear_layer.down.weight": "lora_down",
    "lora_linear_layer.up.weight": "lora_up",
    "lora_B.bias": "lora_bias",
    "lora_B.default.bias": "lora_bias",
    "hada_w1_a": "hada_w1_a",
    "hada_t2": "hada_t2",
    "lokr_w1": "lokr_w1",
    "lokr_w2_b": "lokr_w2_b",
    "oft_blocks": "oft_blocks",
    "oft_diag": "oft_diag",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    "on_input": "on_input",
    "a1.weight": "a1.weight",
    "bm.weight": "bm.weight",
}


@pytest.mark.parametrize("spelled", LAYERS)
def test_every_way_to_spell_a_layer_gives_its_name(spelled):
    layer, layout = LAYERS[spelled]
    assert split_key(f"{spelled}.lora_down.weight") == KeyParts(layer, "lora_down", layout)


@pytest.mark.parametrize("suffix", ROLES)
@pytest.mark.parametrize("spelled", [f"lora_unet_{FLAT_TO_Q}", f"unet.{DOTTED_ATTN}.to_q", f"{DOTTED_ATTN}.to_q"])
def test_every_suffix_gives_its_role(spelled, suffix):
    parts = split_key(f"{spelled}.{suffix}")
    assert parts is not None
    layer = f"{TO_Q}.bias" if ROLES[suffix] in ("lora_bias", "diff_b", "b_norm") else TO_Q
    assert (parts.layer, parts.role) == (layer, ROLES[suffix])


@pytest.mark.parametrize("component", ["", "unet.", "base_model.model.unet."])
@pytest.mark.parametrize("processor", ["processor.", ""])
@pytest.mark.parametrize(("part", "layer"), [("to_q", TO_Q), ("to_out", TO_OUT)])
@pytest.mark.parametrize(("side", "role"), [("down", "lora_down"), ("up", "lora_up")])
def test_loras_of_old_attention_processors_belong_to_the_linear_layers(component, processor, part, layer, side, role):
    parts = split_key(f"{component}{DOTTED_ATTN}.{processor}{part}_lora.{side}.weight")
    assert parts is not None
    assert (parts.layer, parts.role) == (layer, role)


def test_layers_inside_pefts_wrapper_have_the_name_of_the_layer():
    assert layer_name("unet", f"{DOTTED_ATTN}.to_q.base_layer") == TO_Q
    assert layer_name("te1", f"_orig_mod.{DOTTED_Q_PROJ}") == Q_PROJ


def test_ia3s_weight_counts_behind_flat_names_only():
    parts = split_key(f"lora_unet_{FLAT_TO_Q}.weight")
    assert parts is not None
    assert (parts.layer, parts.role) == (TO_Q, "weight")
    assert split_key(f"unet.{DOTTED_ATTN}.to_q.weight") is None


@pytest.mark.parametrize(
    "key",
    [
        "",
        ".",
        "...",
        "alpha",
        ".alpha",
        "lora_unet_.alpha",
        "unet..alpha",
        "lora_down.weight",
        "base_model.model.",
        "bundle_emb.style.string_to_param.*",
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "down_blocks.0.attentions.0.proj_in.weight",
        f"unet.{DOTTED_ATTN}.to_q.lora_C.weight",
        "lora_unet_x.lora_down.bias",
    ],
)
def test_keys_that_are_no_tensors_of_an_adapter_are_none(key):
    assert split_key(key) is None


@given(st.text())
def test_any_text_is_split_or_none(text):
    parts = split_key(text)
    assert parts is None or (parts.layer.partition(":")[0] and parts.role and parts.layout)


@given(st.text(min_size=1), st.sampled_from(sorted(ROLES)))
def test_any_path_keeps_its_role(path, suffix):
    parts = split_key(f"lora_unet_{path}.{suffix}")
    assert parts is not None
    assert parts.role == ROLES[suffix]


@pytest.mark.parametrize(
    ("key", "name", "tensor"),
    [
        ("bundle_emb.my style.string_to_param.*", "my style", "string_to_param.*"),
        ("bundle_emb.style.clip_l", "style", "clip_l"),
    ],
)
def test_embeddings_that_come_with_a_lora_are_told_from_its_layers(key, name, tensor):
    assert split_embedding(key) == (name, tensor)


@pytest.mark.parametrize("key", ["bundle_emb.", "bundle_emb.x", "lora_unet_x.lora_up.weight", "xbundle_emb.a.b"])
def test_other_keys_are_no_embeddings(key):
    assert split_embedding(key) is None


@pytest.mark.parametrize("text", ["a.", "lora_A.", ".processor.", "_orig_mod_", "to_q_lora.", "base_layer"])
def test_a_megabyte_of_a_key_takes_less_than_a_second(text):
    key = text * (1_000_000 // len(text)) + "lora_A.x.weight"
    start = time.perf_counter()
    split_key(key)
    assert time.perf_counter() - start < 1
