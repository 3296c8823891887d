"""Checkpoints in one file, of real size and with the original names, filled with random numbers; and LoRAs for them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import synthetic
from lib_lora.core.ldm_names import diffusers_to_ldm, translate
from lib_lora.core.saving import LazyTensor, save_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    Shape = tuple[int, ...]

RANDOM_NUMBERS = 1 << 24
"""So many are drawn, and repeated where more are needed."""


class Tower(NamedTuple):
    """A text encoder: its beginning in a checkpoint and in kohya's LoRAs, and its size."""

    prefix: str
    kohya: str
    width: int
    layers: int
    is_open_clip: bool = False


_CLIP_L, _OPEN_CLIP_G = (768, 12), (1280, 32)
TOWERS = {
    "sd15": (Tower("cond_stage_model.transformer.", "lora_te", *_CLIP_L),),
    "sdxl": (
        Tower("conditioner.embedders.0.transformer.", "lora_te1", *_CLIP_L),
        Tower("conditioner.embedders.1.model.", "lora_te2", *_OPEN_CLIP_G, is_open_clip=True),
    ),
    "small": (Tower("cond_stage_model.transformer.", "lora_te", 64, 2),),
}
_OPEN_CLIP = (
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)


class Model(NamedTuple):
    """The parts of a model, on the meta device."""

    unet: UNet2DConditionModel
    towers: dict[Tower, nn.Module]
    vae: AutoencoderKL


def make_model(model: str) -> Model:
    """A model of `synthetic.MODELS` without numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**synthetic.MODELS[model])
        towers = {tower: CLIPTextModel(_config(tower)) for tower in TOWERS[model]}
        widths = (32, 32, 64, 64) if model == "small" else (128, 256, 512, 512)
        down, up = (("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4)
        vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2)
    return Model(unet, towers, vae)


def write_checkpoint(path: Path, model: Model, dtype: torch.dtype = torch.float16) -> Path:
    """The model as one file with the original's names."""
    numbers = (torch.rand(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(synthetic.SEED)) - 0.5) * 0.1
    numbers = numbers.to(dtype)
    tensors = {name: _random(numbers, shape) for name, shape in _shapes(model)}
    save_tensors(path, tensors, {"format": "pt"})
    return path


def write_lora(path: Path, model: Model) -> Path:
    """A LierLa of `synthetic.RANK` in fp16 on the UNet and the text encoders, as kohya's trainer makes it."""
    others = {tower.kohya: dict(_text_layers(module)) for tower, module in model.towers.items()}
    return synthetic.write_lora(path, synthetic.target_layers(model.unet, "LierLa"), others=others)


def _config(tower: Tower) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=tower.width,
        intermediate_size=4 * tower.width,
        num_hidden_layers=tower.layers,
        num_attention_heads=max(1, tower.width // 64),
    )


def _random(numbers: Tensor, shape: Shape) -> LazyTensor:
    size = math.prod(shape)

    def make() -> Tensor:
        return numbers.repeat(-(-size // len(numbers)))[:size].view(shape)

    return LazyTensor(numbers.dtype, shape, make)


def _shapes(model: Model) -> Iterator[tuple[str, Shape]]:
    unet = {name: tuple(tensor.shape) for name, tensor in model.unet.named_parameters()}
    table = diffusers_to_ldm(name.rpartition(".")[0] for name in unet)
    for name, shape in unet.items():
        yield f"model.diffusion_model.{translate(name, table) or name}", shape
    for tower, module in model.towers.items():
        shapes = {_clip_name(name): tuple(tensor.shape) for name, tensor in module.named_parameters()}
        for name, shape in _open_clip(shapes) if tower.is_open_clip else shapes.items():
            yield tower.prefix + name, shape
    for name, tensor in model.vae.named_parameters():
        yield f"first_stage_model.{name}", tuple(tensor.shape)


def _clip_name(name: str) -> str:
    """With ``text_model.``, which newer versions of transformers leave out."""
    return f"text_model.{name.removeprefix('text_model.')}"


def _open_clip(shapes: dict[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """Names and shapes as open_clip has them: q, k and v are one."""
    for name, shape in shapes.items():
        block = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            yield name.replace("text_model.embeddings.", "").replace("text_model.final_layer_norm", "ln_final"), shape
            continue
        start, inner, kind = f"transformer.resblocks.{block[1]}", block[2], block[3]
        if inner == "self_attn.q_proj":
            yield f"{start}.attn.in_proj_{kind}", (3 * shape[0], *shape[1:])
        elif inner not in ("self_attn.k_proj", "self_attn.v_proj"):
            for theirs, own in _OPEN_CLIP:
                inner = inner.replace(theirs, own)
            yield f"{start}.{inner}.{kind}", shape


def _text_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and "encoder.layers" in name:
            yield _clip_name(name), layer
