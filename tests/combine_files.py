"""LoRA files of a few layers of SD1, for tests of what is made of several, and their sums in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lib_lora.core.network import load_network
from lib_lora.tools.given import given_files
from tests.family_files import FAMILIES, family_tensors, write

if TYPE_CHECKING:
    from pathlib import Path

LDM_LINEAR = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
POINT = "lora_unet_mid_block_attentions_0_proj_in"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {LINEAR: (24, 16), CONV: (24, 8, 3, 3), POINT: (16, 24, 1, 1), TEXT: (16, 12)}
TOY_SHAPES = {"linear": (24, 16), "1x1": (16, 24, 1, 1), "3x3": (24, 8, 3, 3), "rows": (16, 16)}
SD1 = {"ss_base_model_version": "sd_v1"}

THIN = ("LoRA Tucker", "LoHa", "LoHa Tucker", "LoKr", "LoKr both factored")
DENSE = ("LoKr whole", "Full")
NEEDS_BASE = [family for family in FAMILIES if family not in ("LoRA", *THIN, *DENSE)]


def lora(rank: int, alpha: float | None = None, dtype=torch.float32, seed: int = 0, names=tuple(SHAPES), size=0.3):
    """LoRA tensors of some layers, by their whole names."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        out, *rest = SHAPES[name]
        up = torch.randn(out, rank, *(1,) * len(rest[1:]), generator=generator)
        down = torch.randn(rank, *rest, generator=generator)
        layers[name] = {"lora_up.weight": (up * size).to(dtype), "lora_down.weight": (down * size).to(dtype)}
        if alpha is not None:
            layers[name]["alpha"] = torch.tensor(alpha).to(dtype)
    return layers


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Layer → ΔW in float64."""
    found = {}
    for name, adapter in load_network(path).adapters.items():
        found[name] = adapter.delta_weight(torch.empty(()).expand(adapter.shape)).double().flatten(1)
    return found


def exact_sum(paths_and_strengths) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Layer → Σ strength · ΔW, and Σ |strength| · ‖ΔW‖."""
    total: dict[str, torch.Tensor] = {}
    sizes: dict[str, float] = {}
    for path, strength in paths_and_strengths:
        for name, delta in deltas(path).items():
            total[name] = total.get(name, 0) + strength * delta
            sizes[name] = sizes.get(name, 0) + abs(strength) * delta.norm().item()
    return total, sizes


def asked(paths_and_strengths):
    return given_files([f"{path}:{strength}" for path, strength in paths_and_strengths])


def two(folder: Path, **options) -> list[tuple[Path, float]]:
    first = write(folder / "a.safetensors", lora(4, 2.0, seed=1, **options), SD1)
    return [(first, 0.6), (write(folder / "b.safetensors", lora(3, 1.0, seed=2, **options), SD1), -0.4)]


def mixed(folder: Path, family: str, kind: str) -> list[tuple[Path, float]]:
    """One file of a family, one of LoRA."""
    other = write(folder / "a.safetensors", {kind: family_tensors(family, SHAPES[kind], 0)}, SD1)
    return [(other, 0.5), (write(folder / "b.safetensors", lora(2, names=(kind,)), SD1), -0.7)]
