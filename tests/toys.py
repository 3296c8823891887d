"""Small models of real structure, LoRA files for them, and the float64 arithmetic that results are compared with."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lib_lora.core.saving import save_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

GOLDEN = Path(__file__).parent / "golden"


def sd1_unet(**changes) -> nn.Module:
    """Stable Diffusion 1's block structure at 8 to 24 channels."""
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (8, 16, 24, 24),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**settings | changes).eval().requires_grad_(False)


def sdxl_unet() -> nn.Module:
    """SDXL's block structure, with its 722 LierLa layers, at 8 channels."""
    from diffusers import UNet2DConditionModel

    return (
        UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 8, 8),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=8,
            attention_head_dim=(2, 2, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=56,
            norm_num_groups=4,
        )
        .eval()
        .requires_grad_(False)
    )


def text_encoder(width: int = 32, layers: int = 3) -> nn.Module:
    """A small CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=264,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def tiny_sd1() -> tuple[nn.Module, nn.Module]:
    """UNet and text encoder, the same each time."""
    torch.manual_seed(0)
    return sd1_unet(), text_encoder()


def sd1_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(2 latents, their times, what the text encoder said of 9 tokens) for `sd1_unet`, the same each time."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([5, 900]), torch.randn(2, 9, 32, generator=draw)


def lierla(keymap: Iterable) -> list:
    """Linear and 1x1 layers inside transformers, as kohya's LierLa trains them."""
    return [layer for layer in keymap if is_lierla(layer)]


def is_lierla(layer) -> bool:
    if layer.component != "unet":
        return ".self_attn." in layer.key or ".mlp." in layer.key
    inside = ".attentions." in layer.key and "norm" not in layer.key
    return inside and (len(layer.shape) == 2 or tuple(layer.shape[2:]) == (1, 1))


def c3lier(keymap: Iterable) -> list:
    """LierLa and what lies in residual, down- and upsampling blocks, as kohya's C3Lier trains it."""
    blocks = (".resnets.", ".downsamplers.", ".upsamplers.")
    return [
        layer
        for layer in keymap
        if is_lierla(layer)
        or (layer.component == "unet" and any(block in layer.key for block in blocks) and "norm" not in layer.key)
    ]


def kohya_name(layer) -> str:
    component, _, path = layer.key.partition(".")
    prefix = {"unet": "lora_unet", "te1": "lora_te1", "te2": "lora_te2"}[component]
    path = path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"
    return f"{prefix}_{path.replace('.', '_')}"


def lora_tensors(
    layers: Iterable, *, rank: int = 4, alpha: float | None = 2.0, seed: int = 0, std: float = 0.3, dtype=torch.float32
) -> dict[str, Tensor]:
    """Random factors in kohya's format; `up` is not zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        out, *rest = layer.shape
        ones = (1,) * len(rest[1:])
        name = kohya_name(layer)
        tensors[f"{name}.lora_down.weight"] = (torch.randn(rank, *rest, generator=generator) * std).to(dtype)
        tensors[f"{name}.lora_up.weight"] = (torch.randn(out, rank, *ones, generator=generator) * std).to(dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha)).to(dtype)
    return tensors


def write_lora(path: Path, layers: Iterable, metadata: Mapping[str, str] | None = None, **options) -> Path:
    """A LoRA file in kohya's format; options as `lora_tensors`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, lora_tensors(layers, **options), metadata or {}, overwrite=True)
    return path


def exact_sum(base: Tensor, name: str, parts: Iterable[tuple[Mapping[str, Tensor], float]]) -> Tensor:
    """base + Σ strength · alpha / rank · up @ down in float64, for one layer of `lora_tensors`."""
    total = base.double()
    for tensors, strength in parts:
        up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
        alpha = tensors.get(f"{name}.alpha")
        scale = 1.0 if alpha is None else alpha.double().item() / down.shape[0]
        total = total + strength * scale * (up.flatten(1) @ down.flatten(1)).reshape(base.shape)
    return total


def digest(*modules: nn.Module) -> str:
    """Hash of every bit of all parameters and buffers."""
    sha = hashlib.sha256()
    for module in modules:
        names, tensors = zip(*sorted(module.state_dict().items()), strict=True)
        sha.update("\n".join(names).encode())
        pieces = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in tensors]
        sha.update(torch.cat(pieces).numpy())
    return sha.hexdigest()


@cache
def golden_names(family: str) -> dict:
    """kohya's complete layer names of one family: `lierla` list and `c3lier_shapes` dict."""
    import json

    return json.loads((GOLDEN / "fullsize" / f"{family}_lora_names.json").read_text())
