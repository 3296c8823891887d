"""SD3 and Flux in miniature: diffusers' models, and module trees with the names of the original code.

The original names are written down here from SD3's `mmdit.py` and Flux's `model.py`, apart from the product's tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Shapes = dict[str, tuple[int, ...]]


class QkvLinear(nn.Linear):
    """The WebUI's class of SD3's fused projections."""


def flux_shapes(width: int, *, double: int = 2, single: int = 2, guidance: bool = True) -> Shapes:
    """Layer → shape of its weight in Flux's original code."""
    shapes: Shapes = {
        "img_in": (width, 64),
        "txt_in": (width, 32),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (64, width),
    }
    for name, size in ({"time_in": 256, "vector_in": 24} | ({"guidance_in": 256} if guidance else {})).items():
        shapes |= {f"{name}.in_layer": (width, size), f"{name}.out_layer": (width, width)}
    for number in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            shapes |= {
                f"{block}_mod.lin": (6 * width, width),
                f"{block}_attn.qkv": (3 * width, width),
                f"{block}_attn.proj": (width, width),
                f"{block}_mlp.0": (4 * width, width),
                f"{block}_mlp.2": (width, 4 * width),
            }
    for number in range(single):
        block = f"single_blocks.{number}"
        shapes |= {
            f"{block}.modulation.lin": (3 * width, width),
            f"{block}.linear1": (7 * width, width),
            f"{block}.linear2": (width, 5 * width),
        }
    return shapes


def sd3_shapes(width: int, *, depth: int = 2, dual: tuple[int, ...] = ()) -> Shapes:
    """Layer → shape of its weight in SD3's original code; `dual` blocks have SD 3.5 medium's second attention."""
    shapes: Shapes = {
        "x_embedder.proj": (width, 16, 2, 2),
        "context_embedder": (width, 32),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, 24),
        "y_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (64, width),
    }
    for number in range(depth):
        for stream in ("x", "context"):
            block = f"joint_blocks.{number}.{stream}_block"
            last = stream == "context" and number == depth - 1
            parts = 2 if last else 9 if stream == "x" and number in dual else 6
            shapes |= {
                f"{block}.adaLN_modulation.1": (parts * width, width),
                f"{block}.attn.qkv": (3 * width, width),
            }
            if not last:
                shapes |= {
                    f"{block}.attn.proj": (width, width),
                    f"{block}.mlp.fc1": (4 * width, width),
                    f"{block}.mlp.fc2": (width, 4 * width),
                }
        if number in dual:
            block = f"joint_blocks.{number}.x_block.attn2"
            shapes |= {f"{block}.qkv": (3 * width, width), f"{block}.proj": (width, width)}
    return shapes


def checkpoint_shapes(layers: Mapping[str, tuple[int, ...]], prefix: str = "") -> Shapes:
    """Every weight and bias."""
    weights = {f"{prefix}{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{prefix}{name}.bias": shape[:1] for name, shape in layers.items()}


def original_model(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A tree of layers with random weights."""
    root = nn.Module()
    for name, (out, inner, *kernel) in shapes.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        kind = QkvLinear if last == "qkv" else nn.Linear
        node.add_module(last, nn.Conv2d(inner, out, kernel) if kernel else kind(inner, out))
    return root.eval().requires_grad_(False)


def flux(heads: int = 2, size: int = 16, **changes) -> nn.Module:
    """diffusers' Flux of the same shape as `flux_shapes(heads * size)`."""
    from diffusers import FluxTransformer2DModel

    settings = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}
    return (
        FluxTransformer2DModel(
            attention_head_dim=size,
            num_attention_heads=heads,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 6, 6),
            **settings | changes,
        )
        .eval()
        .requires_grad_(False)
    )


def sd3(heads: int = 2, size: int = 16, **changes) -> nn.Module:
    """diffusers' SD3 of the same shape as `sd3_shapes(heads * size)`."""
    from diffusers import SD3Transformer2DModel

    return (
        SD3Transformer2DModel(
            sample_size=8,
            attention_head_dim=size,
            num_attention_heads=heads,
            joint_attention_dim=32,
            caption_projection_dim=heads * size,
            pooled_projection_dim=24,
            pos_embed_max_size=8,
            **{"num_layers": 2} | changes,
        )
        .eval()
        .requires_grad_(False)
    )


def linears(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of the weight of every Linear and Conv2d."""
    kinds = nn.Linear | nn.Conv2d
    return {name: tuple(layer.weight.shape) for name, layer in module.named_modules() if isinstance(layer, kinds)}


def lora(names: Mapping[str, Iterable[int]], *, rank: int = 3, alpha: float | None = 1.5, seed: int = 0) -> dict:
    """Random factors for full names of layers, in kohya's or, where the names have dots, in PEFT's format."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out, *rest) in names.items():
        down, up = ("lora_A", "lora_B") if "." in name else ("lora_down", "lora_up")
        tensors[f"{name}.{down}.weight"] = torch.randn(rank, *rest, generator=generator) * 0.3
        tensors[f"{name}.{up}.weight"] = torch.randn(out, rank, *(1,) * len(rest[1:]), generator=generator) * 0.3
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def delta(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """alpha / rank · up @ down of a layer of `lora`, in float64, (out, in·kh·kw)."""
    down, up = ("lora_A", "lora_B") if "." in name else ("lora_down", "lora_up")
    down, up = tensors[f"{name}.{down}.weight"].double(), tensors[f"{name}.{up}.weight"].double()
    alpha = tensors.get(f"{name}.alpha")
    return (1.0 if alpha is None else alpha.item() / len(down)) * up.flatten(1) @ down.flatten(1)
