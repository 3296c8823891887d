"""Families recognised in files and models; the matrix of files against models."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lib_lora.core.keymap import KeyMap
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import layer_name, split_key
from tests.fullsize import CLIP_L, OPEN_CLIP_G, OPEN_CLIP_H, diffusers_model, facts, kohya_shapes, text_encoder

KOHYA_FAMILIES = {"sd1": BaseModel.SD1, "sd2": BaseModel.SD2, "sdxl": BaseModel.SDXL}

SD3_SPELLINGS = {
    "kohya": {"lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536)},
    "diffusers": {"transformer.transformer_blocks.0.attn.add_q_proj": (1536, 1536)},
}
FLUX_SPELLINGS = {
    "kohya": {"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)},
    "single blocks": {"lora_unet_single_blocks_37_linear1": (21504, 3072)},
    "diffusers": {
        "transformer.transformer_blocks.0.attn.add_q_proj": (3072, 3072),
        "transformer.single_transformer_blocks.0.attn.to_q": (3072, 3072),
    },
    "with CLIP-L": {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
        "lora_unet_single_blocks_0_linear1": (21504, 3072),
    },
}
METADATA = {
    BaseModel.SD1: [
        {"ss_base_model_version": "sd_v1"},
        {"modelspec.architecture": "stable-diffusion-v1/lora"},
        {"ss_v2": "False"},
    ],
    BaseModel.SD2: [
        {"ss_base_model_version": "sd_v2_v"},
        {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"},
        {"ss_v2": "True"},
    ],
    BaseModel.SDXL: [
        {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    ],
    BaseModel.SD3: [{"ss_base_model_version": "sd3"}, {"modelspec.architecture": "stable-diffusion-3-medium/lora"}],
    BaseModel.FLUX: [{"ss_base_model_version": "flux1"}, {"modelspec.architecture": "flux-1-dev/lora"}],
    BaseModel.UNKNOWN: [{}, {"ss_base_model_version": "my model"}],
}


def layers(shapes) -> dict[str, tuple[int, ...]]:
    """Layer name → shape, for names as a file spells them."""
    named = {}
    for name, shape in shapes.items():
        parts = split_key(f"{name}.alpha")
        assert parts is not None
        named[parts.layer] = tuple(shape)
    return named


FILES = {
    BaseModel.SD1: layers(kohya_shapes("sd1")),
    BaseModel.SD2: layers(kohya_shapes("sd2")),
    BaseModel.SDXL: layers(kohya_shapes("sdxl")),
    BaseModel.SD3: layers(SD3_SPELLINGS["kohya"]),
    BaseModel.FLUX: layers(FLUX_SPELLINGS["kohya"]),
}


@cache
def model(family: BaseModel) -> KeyMap:
    names = {known: name for name, known in KOHYA_FAMILIES.items()}
    if family in names:
        return KeyMap.from_modules(diffusers_model(names[family]))
    with torch.device("meta"):
        return KeyMap.from_modules({"transformer": _flux() if family is BaseModel.FLUX else _sd3()})


def _flux() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=1, num_single_layers=1)


def _sd3() -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(num_layers=2, num_attention_heads=24, caption_projection_dim=1536)


@pytest.mark.newest
@pytest.mark.parametrize("on", FILES, ids=lambda family: f"on {family.name}")
@pytest.mark.parametrize("made_for", FILES, ids=lambda family: f"for {family.name}")
def test_a_file_fits_models_of_its_own_family_only(made_for, on):
    file = BaseModel.of_file(FILES[made_for], {})
    assert file is made_for
    assert model(on).base_model is on
    assert file.compatible(model(on).base_model) is (made_for is on)


@pytest.mark.parametrize("family", KOHYA_FAMILIES)
@pytest.mark.parametrize("component", ["lora_unet_", "lora_te"])
def test_a_file_for_the_unet_or_the_text_encoders_alone_is_told_by_its_shapes(family, component):
    part = {name: shape for name, shape in kohya_shapes(family).items() if name.startswith(component)}
    assert BaseModel.of_file(layers(part), {}) is KOHYA_FAMILIES[family]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_file_of_sd1_or_sd2_in_ldm_spelling_is_told_by_its_shapes(family):
    spelled = {
        f"diffusion_model.{entry['ldm'].removesuffix('.weight')}": entry["shape_ldm"]
        for entry in facts(f"{family}_unet_diffusers_to_ldm").values()
        if entry["ldm"].endswith(".weight")
    }
    assert BaseModel.of_file(layers(spelled), {}) is KOHYA_FAMILIES[family]


def test_a_file_of_sdxl_in_diffusers_spelling_is_told_by_its_depth_alone():
    shapes = {layer_name("unet", layer.key.removeprefix("unet.")): () for layer in model(BaseModel.SDXL)}
    assert BaseModel.of_file(shapes, {}) is BaseModel.SDXL


@pytest.mark.parametrize(
    ("context", "family"),
    [(768, BaseModel.SD1), (1024, BaseModel.SD2), (2048, BaseModel.SDXL), (1280, BaseModel.SDXL)],
)
def test_one_layer_that_reads_the_text_tells_the_family_by_its_width(context, family):
    shapes = {"unet:input_blocks_4_1_transformer_blocks_0_attn2_to_v": (640, context)}
    assert BaseModel.of_model(shapes) is family


@pytest.mark.parametrize("spelling", SD3_SPELLINGS)
def test_sd3_is_told_by_its_names(spelling):
    assert BaseModel.of_file(layers(SD3_SPELLINGS[spelling]), {}) is BaseModel.SD3


@pytest.mark.parametrize("spelling", FLUX_SPELLINGS)
def test_flux_is_told_by_its_names(spelling):
    assert BaseModel.of_file(layers(FLUX_SPELLINGS[spelling]), {}) is BaseModel.FLUX


@pytest.mark.parametrize(
    ("family", "metadata"), [(family, metadata) for family, texts in METADATA.items() for metadata in texts]
)
def test_metadata_tells_the_family_where_layers_do_not(family, metadata):
    shapes = {"unet:down_blocks_0_attentions_0_proj_in": (320, 320)}
    assert BaseModel.of_file(shapes, metadata) is family
    assert BaseModel.of_file({}, metadata) is family


def test_layers_are_believed_and_not_metadata_that_contradicts_them():
    assert BaseModel.of_file(FILES[BaseModel.SDXL], {"ss_base_model_version": "sd_v1"}) is BaseModel.SDXL
    assert BaseModel.of_file(FILES[BaseModel.SD1], {"ss_base_model_version": "sdxl_base_v1-0"}) is BaseModel.SD1


def test_a_file_for_clip_l_alone_is_sdxls_where_its_metadata_says_so():
    part = {name: shape for name, shape in kohya_shapes("sdxl").items() if name.startswith("lora_te1_")}
    assert BaseModel.of_file(layers(part), {"ss_base_model_version": "sdxl_base_v1-0"}) is BaseModel.SDXL


def test_layers_of_unknown_shape_and_small_models_are_unknown():
    small = {"unet:mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (24, 32)}
    assert BaseModel.of_model(small) is BaseModel.UNKNOWN
    assert BaseModel.of_file({"unet:mid_block_attentions_0_transformer_blocks_0_attn2_to_k": ()}, {}) is (
        BaseModel.UNKNOWN
    )
    assert BaseModel.of_file({}, {}) is BaseModel.UNKNOWN


@pytest.mark.parametrize(
    ("component", "config", "family"),
    [("te1", CLIP_L, BaseModel.UNKNOWN), ("te1", OPEN_CLIP_H, BaseModel.SD2), ("te2", OPEN_CLIP_G, BaseModel.SDXL)],
)
def test_a_lone_text_encoder_is_told_where_only_one_family_has_it(component, config, family):
    with torch.device("meta"):
        assert KeyMap.from_modules({component: text_encoder(config)}).base_model is family


@pytest.mark.parametrize("family", BaseModel)
def test_what_is_unknown_is_compatible_with_everything(family):
    assert family.compatible(BaseModel.UNKNOWN)
    assert BaseModel.UNKNOWN.compatible(family)
    assert family.compatible(family)
