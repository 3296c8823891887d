"""Checkpoint files under the original names of SD1, SD2 and SDXL, written from diffusers and transformers modules.

The opposite direction of what loading does, on its own: names from the configurations of CompVis, Stability AI and
open_clip.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from lib_lora.core.saving import save_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def unet_name(name: str, unet: nn.Module) -> str:
    path, _, kind = name.rpartition(".")
    if path in UNET_ENDS:
        return f"{UNET_ENDS[path]}.{kind}"
    side, rest = path.split(".", 1)
    if side == "mid_block":
        part, number, inner = rest.split(".", 2)
        place = "middle_block.1" if part == "attentions" else f"middle_block.{2 * int(number)}"
    else:
        block, part, number, inner = rest.split(".", 3)
        first = 3 * int(block) + (1 if side == "down_blocks" else 0)
        stage = "input_blocks" if side == "down_blocks" else "output_blocks"
        slot = "1" if part == "attentions" else "0"
        if part == "upsamplers":
            number, slot = "2", "2" if hasattr(unet.up_blocks[int(block)], "attentions") else "1"
        if part == "downsamplers":
            number, inner = "2", "op"
        place = f"{stage}.{first + int(number)}.{slot}"
    return f"{place}.{RESNET.get(inner, inner) if part == 'resnets' else inner}.{kind}"


def vae_name(name: str) -> str:
    levels = 4
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    up = lambda part: lambda found: f"up.{levels - 1 - int(found[1])}.{part}"  # noqa: E731
    name = re.sub(r"up_blocks\.(\d)\.resnets", up("block"), name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", up("upsample"), name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if "mid_block.attentions.0." in name:
        side, inner = name.split("mid_block.attentions.0.")
        path, _, kind = inner.rpartition(".")
        return f"{side}mid.attn_1.{VAE_ATTENTION[path]}.{kind}"
    return name


def vae_tensor(name: str, tensor: Tensor) -> Tensor:
    """The VAE's attention is made of 1x1 convolutions there."""
    return tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor


def open_clip_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "text_projection.weight":
            made["text_projection"] = tensor.T
        elif block and block[2] == "self_attn.q_proj":
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            made[f"transformer.resblocks.{block[1]}.attn.in_proj_{block[3]}"] = torch.cat(parts)
        elif block and block[2] in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        elif block:
            inner = OPEN_CLIP.get(block[2], block[2].replace("self_attn", "attn"))
            made[f"transformer.resblocks.{block[1]}.{inner}.{block[3]}"] = tensor
        else:
            short = name.removeprefix("embeddings.").replace("final_layer_norm", "ln_final")
            made[short.replace("position_embedding.weight", "positional_embedding")] = tensor
    return made


def tower_state(tower: nn.Module) -> dict[str, Tensor]:
    """Parameters without ``text_model.``, whichever version of transformers made the module."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tower.named_parameters()}


def clip_tensors(tower: nn.Module, spelling: str = "text_model.") -> dict[str, Tensor]:
    return {f"{spelling}{name}": tensor for name, tensor in tower_state(tower).items()}


def ldm_tensors(unet: nn.Module, vae: nn.Module, towers: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A whole checkpoint; `towers`: prefix → tensors under the prefix."""
    tensors = {f"model.diffusion_model.{unet_name(name, unet)}": value for name, value in unet.named_parameters()}
    for name, value in vae.named_parameters():
        tensors[f"first_stage_model.{vae_name(name)}"] = vae_tensor(name, value)
    for prefix, own in towers.items():
        tensors |= {f"{prefix}{name}": value for name, value in own.items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, metadata or {}, overwrite=True)
    return path
