"""LoRAs whose layers look like another family's: told apart, and refused by both names."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lib_lora.core.keymap import KeyMap
from lib_lora.core.models import BaseModel
from lib_lora.core.plan import match_network
from lib_lora.errors import BaseModelMismatchError, ShapeMismatchError
from tests.fullsize import diffusers_model, kohya_shapes
from tests.transformer_layers import network
from tests.transformer_models import checkpoint_shapes, flux, flux_shapes, lora, sd3, sd3_shapes

pytestmark = pytest.mark.newest


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FILES = {
    "Flux, kohya": ("Flux", {"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)}),
    "Flux, double blocks alone": (
        "Flux",
        {f"transformer.transformer_blocks.0.attn.{name}": (3072, 3072) for name in (*ATTENTION, "add_q_proj")},
    ),
    "Flux, single blocks alone": ("Flux", {"transformer.single_transformer_blocks.0.proj_mlp": (12288, 3072)}),
    "SD3, kohya": ("SD 3.x", {"lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536)}),
    "SD3, diffusers": ("SD 3.x", {f"transformer.transformer_blocks.0.attn.{name}": (1536, 1536) for name in ATTENTION}),
    "SD3.5 large": ("SD 3.x", {f"transformer.transformer_blocks.0.attn.{name}": (2432, 2432) for name in ATTENTION}),
    "SD3 with CLIP-G": (
        "SD 3.x",
        {
            "transformer.transformer_blocks.0.attn.to_q": (1536, 1536),
            "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (1280, 1280),
        },
    ),
    "SD1": ("SD 1.x", {name: shape for name, shape in kohya_shapes("sd1").items() if name.endswith("attn2_to_k")}),
    "SDXL": ("SDXL", {name: shape for name, shape in kohya_shapes("sdxl").items() if name.endswith("attn2_to_k")}),
}


@cache
def full_size(model: str) -> KeyMap:
    if model in ("sd1", "sdxl"):
        return KeyMap.from_modules(diffusers_model(model))
    if model.endswith("original"):
        return KeyMap.from_checkpoint(
            checkpoint_shapes(flux_shapes(3072) if model.startswith("flux") else sd3_shapes(1536))
        )
    with torch.device("meta"):
        return KeyMap.from_modules(
            {"transformer": flux(heads=24, size=128) if model == "flux" else sd3(heads=24, size=64)}
        )


MODELS = {
    "sd1": "SD 1.x",
    "sdxl": "SDXL",
    "flux": "Flux",
    "flux original": "Flux",
    "sd3": "SD 3.x",
    "sd3 original": "SD 3.x",
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("file", FILES)
def test_a_lora_for_another_family_is_refused_by_both_names(file, model):
    made_for, shapes = FILES[file]
    loaded = network(lora(shapes, rank=1, alpha=None))
    if made_for != MODELS[model]:
        with pytest.raises(
            BaseModelMismatchError, match=f"^style was made for {made_for}, this model is {MODELS[model]}$"
        ):
            match_network(full_size(model), loaded)
    elif file == "SD3.5 large":
        with pytest.raises(ShapeMismatchError, match=r"\(1536, 1536\) here, \(2432, 2432\) in the LoRA"):
            match_network(full_size(model), loaded)
    else:
        assert match_network(full_size(model), loaded).layers


def test_blocks_of_unknown_width_are_told_by_metadata_alone():
    shapes = {"transformer:transformer_blocks_0_attn_to_q": ()}
    assert BaseModel.of_file(shapes, {}) is BaseModel.UNKNOWN
    assert BaseModel.of_file(shapes, {"ss_v2": "False"}) is BaseModel.UNKNOWN
    assert BaseModel.of_file(shapes, {"modelspec.architecture": "flux-1-dev/lora"}) is BaseModel.FLUX
    assert BaseModel.of_file(shapes, {"ss_base_model_version": "sd3m"}) is BaseModel.SD3


@pytest.mark.parametrize(
    "layer", ["double_blocks_0_img_mod_linear", "single_transformer_blocks_0_attn_to_qkv_mlp_proj"]
)
def test_other_models_with_blocks_named_as_fluxs_are_not_taken_for_it(layer):
    assert BaseModel.of_file({f"unet:{layer}": (9216, 3072), "unet:single_blocks_0_linear1": ()}, {}) is (
        BaseModel.UNKNOWN
    )
