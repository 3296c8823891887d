"""Models of real shape with random weights, and LoRA files that fit them: speed does not depend on what was learned."""

from __future__ import annotations

import copy
import zlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from lib_lora.core.saving import save_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    LoraSet = tuple[tuple[str, float], ...]

SEED = 20261121
KINDS = ("LierLa", "C3Lier")
STRENGTHS = (0.8, 0.6, 0.4, 1.0, -0.3, 0.7, 0.5)
RANK = 32

_SD15 = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 96, 96),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
MODELS: dict[str, dict[str, Any]] = {"sd15": _SD15, "sdxl": _SDXL, "small": _SMALL}

_LIERLA_BLOCKS = ("Transformer2DModel",)
_C3LIER_BLOCKS = (*_LIERLA_BLOCKS, "ResnetBlock2D", "Downsample2D", "Upsample2D")


class Factors(NamedTuple):
    """One layer of a LoRA file as the peers hold it: ΔW = scale · up @ down.

    Attributes:
        up: (out, rank) or (out, rank, 1, 1).
        down: (rank, in) or (rank, in, kh, kw).
        scale: alpha / rank.
    """

    up: Tensor
    down: Tensor
    scale: float


def make_unet(model: str, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """A UNet of `MODELS` in evaluation mode; its random weights keep the activations near 1."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS[model])
    nn.Module.to(unet, dtype).to_empty(device=device).eval().requires_grad_(False)  # diffusers' own `to` warns
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("weight")))
        else:
            bound = (3 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
    return unet


def sibling(unet: UNet2DConditionModel, own: Iterable[Tensor] = ()) -> UNet2DConditionModel:
    """A second UNet that shares all weights with the first but those in `own`, of which it gets copies."""
    own_ids = {id(tensor) for tensor in own}
    shared = {id(parameter): parameter for parameter in unet.parameters() if id(parameter) not in own_ids}
    return copy.deepcopy(unet, shared)


def target_layers(unet: nn.Module, kind: str) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers kohya's trainer puts a LoRA on: path in the UNet → layer."""
    blocks = _LIERLA_BLOCKS if kind == "LierLa" else _C3LIER_BLOCKS
    return {
        f"{path}.{name}": layer
        for path, block in unet.named_modules()
        if type(block).__name__ in blocks
        for name, layer in block.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def target_weights(unet: nn.Module, kind: str) -> list[Tensor]:
    """The weights those layers have."""
    return [layer.weight for layer in target_layers(unet, kind).values()]


def write_lora(
    path: Path,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    rank: int = RANK,
    dtype: torch.dtype = torch.float16,
    others: Mapping[str, Mapping[str, nn.Linear | nn.Conv2d]] = MappingProxyType({}),
) -> Path:
    """Write a LoRA file in kohya's format, alpha half the rank, ΔW about 5 % of the weights' size.

    Args:
        path: The file.
        layers: Of the UNet.
        rank: Of each layer.
        dtype: Of the factors.
        others: kohya's prefix of another component, such as ``lora_te`` → its layers.
    """
    generator = torch.Generator().manual_seed(SEED ^ zlib.crc32(path.stem.encode()))
    tensors: dict[str, Tensor] = {}
    for prefix, own in {"lora_unet": layers, **others}.items():
        for name, layer in own.items():
            fan_in = layer.weight[0].numel()
            key, tail = f"{prefix}_{name.replace('.', '_')}", (1,) * (layer.weight.ndim - 2)
            up = torch.empty(layer.weight.shape[0], rank, *tail).uniform_(-1, 1, generator=generator)
            down = torch.empty(rank, *layer.weight.shape[1:]).uniform_(-1, 1, generator=generator)
            tensors[f"{key}.lora_up.weight"] = up.mul_(0.3 * rank**-0.5).to(dtype)
            tensors[f"{key}.lora_down.weight"] = down.mul_(fan_in**-0.5).to(dtype)
            tensors[f"{key}.alpha"] = torch.tensor(rank / 2, dtype=dtype)
    save_tensors(path, tensors, {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)})
    return path


def write_loras(
    folder: Path, unet: nn.Module, kind: str, ranks: Sequence[int], prefix: str = "", dtype: torch.dtype = torch.float16
) -> LoraSet:
    """Write one LoRA for each rank; returns the set of them, each with another strength."""
    layers = target_layers(unet, kind)
    names = [f"{prefix}{kind}-{number}" for number, _ in enumerate(ranks)]
    for name, rank in zip(names, ranks, strict=True):
        write_lora(folder / f"{name}.safetensors", layers, rank, dtype)
    return tuple((name, STRENGTHS[number % len(STRENGTHS)]) for number, name in enumerate(names))


def read_factors(path: Path, layers: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, Factors]:
    """A LoRA file as the peers keep it in memory: layer's path → factors in the model's dtype."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    factors: dict[str, Factors] = {}
    for name in layers:
        key = f"lora_unet_{name.replace('.', '_')}"
        up, down = (tensors[f"{key}.lora_{role}.weight"].to(device, dtype) for role in ("up", "down"))
        factors[name] = Factors(up, down, tensors[f"{key}.alpha"].item() / down.shape[0])
    return factors


def step_inputs(unet: UNet2DConditionModel, latent: int) -> dict[str, Any]:
    """Arguments of one denoising step: batch 1, `latent` x `latent` latents, 77 tokens."""
    generator = torch.Generator(unet.device).manual_seed(SEED)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=unet.device, dtype=torch.float32).to(unet.dtype)

    inputs: dict[str, Any] = {
        "sample": noise(1, unet.config.in_channels, latent, latent),
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": noise(1, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": noise(1, 1280), "time_ids": noise(1, 6)}
    return inputs
