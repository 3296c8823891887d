"""Real SD1, SD2 and SDXL without their weights: diffusers models on the meta device, and LDM and sgm single files.

The facts in `tests/golden/fullsize` were made with kohya's converters, not with this project's.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).parent / "golden" / "fullsize"
FAMILIES = ("sd1", "sd2", "sdxl")

_CROSS, _UP_CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_SD_UNET = {
    "down_block_types": (_CROSS, _CROSS, _CROSS, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", _UP_CROSS, _UP_CROSS, _UP_CROSS),
    "block_out_channels": (320, 640, 1280, 1280),
}
UNETS = {
    "sd1": _SD_UNET | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": _SD_UNET
    | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "down_block_types": ("DownBlock2D", _CROSS, _CROSS),
        "up_block_types": (_UP_CROSS, _UP_CROSS, "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TEXT_ENCODERS = {
    "sd1": {"te1": CLIP_L},
    "sd2": {"te1": OPEN_CLIP_H},
    "sdxl": {"te1": CLIP_L, "te2": OPEN_CLIP_G},
}
UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIXES = {
    ("sd1", "te1"): "cond_stage_model.transformer.text_model.",
    ("sd2", "te1"): "cond_stage_model.model.",
    ("sdxl", "te1"): "conditioner.embedders.0.transformer.text_model.",
    ("sdxl", "te2"): "conditioner.embedders.1.model.",
}
LDM_COMPONENTS = {
    "sd1": {"unet": "model", "te1": "cond_stage_model"},
    "sd2": {"unet": "model", "te1": "cond_stage_model"},
    "sdxl": {"unet": "model", "te1": "conditioner.embedders.0", "te2": "conditioner.embedders.1"},
}
"""What a host that runs the original code hands over: the part of the whole model that each component is."""

_RESBLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def facts(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


def kohya_shapes(family: str) -> dict[str, list[int]]:
    """kohya's name of every layer that a C3Lier of this family changes → shape of its weight."""
    return facts(f"{family}_lora_names")["c3lier_shapes"]


@cache
def diffusers_model(family: str) -> dict[str, nn.Module]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        towers = {name: text_encoder(config) for name, config in TEXT_ENCODERS[family].items()}
        return {"unet": UNet2DConditionModel(**UNETS[family]), **towers}


def text_encoder(config: Mapping[str, int]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@cache
def single_file(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the family's single-file checkpoint, without its VAE, in the original code's spelling."""
    model = diffusers_model(family)
    names = {UNET_PREFIX + name: shape for name, shape in _ldm_unet(family, model["unet"]).items()}
    for component in TEXT_ENCODERS[family]:
        prefix = TEXT_PREFIXES[family, component]
        plain = {name.removeprefix("text_model."): shape for name, shape in shapes(model[component]).items()}
        convert = dict.items if prefix.endswith("text_model.") else _open_clip
        names |= {prefix + name: shape for name, shape in convert(plain)}
    return names


def _ldm_unet(family: str, unet: nn.Module) -> dict[str, tuple[int, ...]]:
    if family != "sdxl":
        return {entry["ldm"]: tuple(entry["shape_ldm"]) for entry in facts(f"{family}_unet_diffusers_to_ldm").values()}
    prefixes = facts("sdxl_diffusers_to_sgm_prefix")
    return {to_sgm(name, prefixes): shape for name, shape in shapes(unet).items()}


def to_sgm(name: str, prefixes: Mapping[str, str]) -> str:
    prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)
    return prefixes[prefix] + name.removeprefix(prefix)


def _open_clip(tensors: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "positional_embedding", tensors["embeddings.position_embedding.weight"]
    yield "token_embedding.weight", tensors["embeddings.token_embedding.weight"]
    yield "ln_final.weight", tensors["final_layer_norm.weight"]
    for name, shape in tensors.items():
        if not name.startswith("encoder.layers."):
            continue
        number, inner = name.removeprefix("encoder.layers.").split(".", 1)
        layer, kind = inner.rsplit(".", 1)
        block = f"transformer.resblocks.{number}"
        if layer == "self_attn.q_proj":
            yield f"{block}.attn.in_proj_{kind}", (3 * shape[0], *shape[1:])
        elif layer in _RESBLOCK:
            yield f"{block}.{_RESBLOCK[layer]}.{kind}", shape


def ldm_modules(family: str) -> dict[str, nn.Module]:
    """Components of a live model of the original code: a tree of bare modules, weights on the meta device."""
    root = nn.Module()
    for name, shape in single_file(family).items():
        path, _, attribute = name.rpartition(".")
        if attribute in ("weight", "in_proj_weight"):
            _place(root, path.split("."), _module(attribute, shape))
    return {component: root.get_submodule(path) for component, path in LDM_COMPONENTS[family].items()}


def _place(root: nn.Module, path: list[str], leaf: nn.Module) -> None:
    for part in path[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if path[-1] not in root._modules:  # out_proj comes with its MultiheadAttention
        root.add_module(path[-1], leaf)


def _module(attribute: str, shape: tuple[int, ...]) -> nn.Module:
    with torch.device("meta"):
        if attribute == "in_proj_weight":
            return nn.MultiheadAttention(shape[1], num_heads=shape[1] // 64)
        if len(shape) == 1:
            return nn.LayerNorm(shape[0])
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0])
        return nn.Conv2d(shape[1], shape[0], shape[2:])
