"""Tiny SD3 and Flux models in both structures, their key maps, and what a LoRA adds to their parameters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import nn

from lib_lora.core.files import FileIdentity, LoraFile
from lib_lora.core.keymap import KeyMap
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import split_key
from lib_lora.core.network import network_from_file
from lib_lora.core.plan import match_network
from tests.transformer_models import checkpoint_shapes, flux, flux_shapes, original_model, sd3, sd3_shapes

TOLERANCE = 1e-5  # float32, entries of about 1
WIDTH = 32
FLUX_WIDTH = 3072
"""Diffusers' converters know Flux in this width only."""

FAMILIES = ("flux", "sd3", "sd3.5")
BASE_MODELS = {"flux": BaseModel.FLUX, "sd3": BaseModel.SD3, "sd3.5": BaseModel.SD3}
BLOCKS = {"flux": "double_blocks.0.img_attn", "sd3": "joint_blocks.0.x_block.attn"}


def original_shapes(family: str, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    if family == "flux":
        return flux_shapes(width)
    return sd3_shapes(width, dual=(0,) if family == "sd3.5" else ())


@cache
def original(family: str) -> nn.Module:
    return original_model(original_shapes(family))


@cache
def diffusers(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "flux":
        return flux()
    return sd3(dual_attention_layers=(0,)) if family == "sd3.5" else sd3()


@cache
def keymap(family: str, structure: str) -> KeyMap:
    if structure == "diffusers":
        return KeyMap.from_modules({"transformer": diffusers(family)})
    return KeyMap.from_modules({"unet": original(family)})


@cache
def converted(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint whose rows are numbered, and what diffusers' own converter makes of it."""
    from diffusers.loaders import single_file_utils

    names = checkpoint_shapes(original_shapes(family, FLUX_WIDTH if family == "flux" else WIDTH))
    norms = ("norm.query_norm.scale", "norm.key_norm.scale")
    if family == "flux":
        streams = [f"double_blocks.{number}.{stream}_attn" for number in range(2) for stream in ("img", "txt")]
        names |= {
            f"{block}.{norm}": (1,) for block in (*streams, *map("single_blocks.{}".format, range(2))) for norm in norms
        }
    tensors = {name: number * 100_000 + torch.arange(names[name][0]) for number, name in enumerate(names)}
    # the context embedder's height is read as the width of the model
    result = dict(tensors) | {"pos_embed": torch.zeros(1)}
    convert = "flux" if family == "flux" else "sd3"
    return tensors, getattr(single_file_utils, f"convert_{convert}_transformer_checkpoint_to_diffusers")(result)


def layer_name(spelled: str) -> str:
    parts = split_key(f"{spelled}.alpha")
    assert parts is not None
    return parts.layer


def rows_of(tensor: torch.Tensor, rows) -> torch.Tensor:
    return torch.cat([tensor[start:stop] for start, stop in rows]) if rows else tensor


def network(tensors, name: str = "style"):
    path = Path(f"{name}.safetensors")
    return network_from_file(LoraFile(path, FileIdentity(path, 1, 1, 1), {}, tensors))


def updates(keymap: KeyMap, tensors) -> dict[str, torch.Tensor]:
    """Full name of each parameter that a file changes → what is added to it, in float32."""
    match = match_network(keymap, network(tensors))
    assert not match.unmatched
    shapes = {layer.parameter: tuple(layer.weight().shape) for layer in keymap.parameters}
    totals: dict[str, torch.Tensor] = {}
    for layer, adapter in match.layers:
        total = totals.setdefault(layer.parameter, torch.zeros(shapes[layer.parameter]))
        part = total if layer.rows is None else total[layer.rows[0] : layer.rows[1]]
        part += adapter.delta_weight(part)
    return totals


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.double() - b.double().reshape(a.shape)).abs().max().item() < TOLERANCE
