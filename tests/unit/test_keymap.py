"""KeyMap on live models: wrappers, unusual structures, quantised weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_lora.core.keymap import KeyMap
from lib_lora.core.models import BaseModel
from tests.toys import sd1_unet, sdxl_unet, text_encoder

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_Q_LAYER = "unet:down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


class Holder(nn.Module):
    """A module under a name, as hosts wrap text encoders and UNets."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def keys(keymap: KeyMap) -> set[str]:
    return {layer.key for layer in keymap}


@pytest.fixture(scope="module")
def unet_keys() -> set[str]:
    return keys(KeyMap.from_modules({"unet": sd1_unet()}))


def test_every_linear_and_convolution_is_a_layer(unet_keys):
    unet = sd1_unet()
    expected = {f"unet.{name}" for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert expected <= unet_keys
    assert {
        "unet.conv_in",
        "unet.conv_out",
        "unet.time_embedding.linear_1",
        "unet.down_blocks.0.resnets.0.time_emb_proj",
        "unet.down_blocks.1.resnets.0.conv_shortcut",
        "unet.down_blocks.0.downsamplers.0.conv",
        "unet.up_blocks.0.upsamplers.0.conv",
    } <= expected


def test_norms_are_layers_too(unet_keys):
    assert "unet.down_blocks.0.resnets.0.norm1" in unet_keys
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.norm1" in unet_keys


def test_a_compiled_model_has_the_same_layers(unet_keys):
    compiled = torch.compile(sd1_unet())
    keymap = KeyMap.from_modules({"unet": compiled})
    assert keys(keymap) == unet_keys
    layer = keymap.find(TO_Q_LAYER)
    assert layer is not None
    assert layer.parameter == f"_orig_mod.{TO_Q}.weight"
    assert compiled.get_parameter(layer.parameter) is layer.weight()


def test_a_model_of_which_blocks_and_layers_are_compiled_has_the_same_layers(unet_keys):
    unet = sd1_unet()
    unet.down_blocks[0] = torch.compile(unet.down_blocks[0])
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q = torch.compile(attention.to_q)
    assert keys(KeyMap.from_modules({"unet": unet})) == unet_keys


@pytest.mark.newest
def test_a_model_with_pefts_adapters_has_the_layers_of_the_bare_one(unet_keys):
    from peft import LoraConfig, inject_adapter_in_model

    unet = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "conv1"]), sd1_unet())
    keymap = KeyMap.from_modules({"unet": unet})
    assert keys(keymap) == unet_keys
    layer = keymap.find(TO_Q_LAYER)
    assert layer is not None
    assert layer.parameter == f"{TO_Q}.base_layer.weight"
    assert layer.weight() is unet.get_submodule(TO_Q).base_layer.weight


@pytest.mark.parametrize("layers", [1, 3])
def test_a_unet_with_another_number_of_layers_per_block_is_spelled_in_ldm_too(layers):
    unet = sd1_unet(layers_per_block=layers)
    keymap = KeyMap.from_modules({"unet": unet})
    last_block = 4 * (layers + 1) - 1
    assert keymap.find(f"unet:output_blocks_{last_block}_1_proj_out").key == (
        f"unet.up_blocks.3.attentions.{layers}.proj_out"
    )
    assert keymap.find(f"unet:input_blocks_{layers + 1}_0_op").key == "unet.down_blocks.0.downsamplers.0.conv"
    first_upsampler = keymap.find(f"unet:output_blocks_{layers}_1_conv")
    assert first_upsampler.key == "unet.up_blocks.0.upsamplers.0.conv"
    assert keymap.find(f"unet:output_blocks_{2 * layers + 1}_2_conv").key == "unet.up_blocks.1.upsamplers.0.conv"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda clip: clip,
        lambda clip: Holder(text_model=clip),
        lambda clip: Holder(transformer=Holder(text_model=clip)),
        lambda clip: Holder(wrapped=Holder(transformer=clip)),
    ],
    ids=["transformers 5", "transformers 4", "LDM", "WebUI"],
)
def test_a_text_encoder_has_the_same_layers_however_it_is_wrapped(wrap):
    clip = text_encoder()
    clip = getattr(clip, "text_model", clip)
    keymap = KeyMap.from_modules({"te1": wrap(clip)})
    layer = keymap.find("te1:encoder_layers_2_mlp_fc1")
    assert layer.key == "te1.text_model.encoder.layers.2.mlp.fc1"
    assert layer.weight() is clip.encoder.layers[2].mlp.fc1.weight
    assert keys(keymap) == keys(KeyMap.from_modules({"te1": text_encoder()}))


def test_the_projection_beside_a_text_model_is_a_layer_of_its_own():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    keymap = KeyMap.from_modules({"te2": CLIPTextModelWithProjection(config)})
    assert keymap.find("te2:text_projection").key == "te2.text_projection"
    assert keymap.find("te2:encoder_layers_0_mlp_fc2").key == "te2.text_model.encoder.layers.0.mlp.fc2"


def test_the_image_tower_of_an_open_clip_model_is_left_out():
    def tower() -> nn.Module:
        block = Holder(attn=nn.MultiheadAttention(4, 1), mlp=Holder(c_fc=nn.Linear(4, 8), c_proj=nn.Linear(8, 4)))
        return Holder(resblocks=nn.Sequential(block))

    text = tower()
    keymap = KeyMap.from_modules({"te1": Holder(visual=Holder(transformer=tower()), transformer=text)})
    assert keymap.find("te1:encoder_layers_0_mlp_fc1").weight() is text.resblocks[0].mlp.c_fc.weight
    assert len(keymap) == 6


def test_writing_through_a_part_of_a_fused_weight_changes_its_rows_only():
    attention = nn.MultiheadAttention(4, 1)
    root = Holder(transformer=Holder(resblocks=nn.Sequential(Holder(attn=attention))))
    before = attention.in_proj_weight.detach().clone()
    layer = KeyMap.from_modules({"te1": root}).find("te1:encoder_layers_0_self_attn_k_proj")
    layer.live().zero_()
    assert torch.equal(attention.in_proj_weight[4:8], torch.zeros(4, 4))
    assert torch.equal(attention.in_proj_weight[:4], before[:4])
    assert torch.equal(attention.in_proj_weight[8:], before[8:])


def test_a_packed_weight_has_the_shape_of_its_layer():
    unet = sd1_unet()
    linear = unet.get_submodule(TO_Q)
    linear.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    layer = KeyMap.from_modules({"unet": unet}).find(TO_Q_LAYER)
    assert layer.shape == (8, 8)
    assert layer.weight() is linear.weight


def test_a_weight_in_a_buffer_is_a_layer():
    unet = sd1_unet()
    linear = unet.get_submodule(TO_Q)
    del linear.weight
    linear.register_buffer("weight", torch.zeros(8, 8, dtype=torch.int8))
    assert KeyMap.from_modules({"unet": unet}).find(TO_Q_LAYER).weight() is linear.weight


def test_an_unknown_component_keeps_its_names():
    keymap = KeyMap.from_modules({"transformer": Holder(proj=nn.Linear(2, 3))})
    assert keymap.find("transformer:proj").shape == (3, 2)
    assert keymap.base_model is BaseModel.UNKNOWN


def test_a_name_the_model_has_not_is_none():
    keymap = KeyMap.from_modules({"unet": sd1_unet()})
    assert keymap.find("unet:down_blocks_9_attentions_0_proj_in") is None
    assert keymap.find("te1:encoder_layers_0_mlp_fc1") is None
    assert keymap.find("") is None


def test_a_model_without_layers_is_an_empty_map():
    keymap = KeyMap.from_modules({"unet": nn.Identity()})
    assert (len(keymap), list(keymap), keymap.components) == (0, [], ())


def test_toys_are_told_by_structure_or_not_at_all():
    assert KeyMap.from_modules({"unet": sd1_unet(), "te1": text_encoder()}).base_model is BaseModel.UNKNOWN
    assert KeyMap.from_modules({"unet": sdxl_unet()}).base_model is BaseModel.SDXL


def test_other_tensors_of_a_checkpoint_are_no_layers():
    keymap = KeyMap.from_checkpoint(
        {
            "alphas_cumprod": (1000,),
            "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
            "model.diffusion_model.out.2.bias": (4,),
            "model_ema.decay": (),
        }
    )
    assert len(keymap) == 0


def test_the_text_encoder_of_early_checkpoints_has_no_text_model_in_its_names():
    keymap = KeyMap.from_checkpoint({"cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight": (3072, 768)})
    assert keymap.find("te1:encoder_layers_0_mlp_fc1").key == "te1.text_model.encoder.layers.0.mlp.fc1"
