"""Toys whose LoRAs' strengths move: a UNet and a text encoder of two layers each, LoRA files, and float64 sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.core import numerics
from lib_lora.core.saving import save_tensors
from tests.family_files import family_tensors

if TYPE_CHECKING:
    from pathlib import Path

OUT, IN, RANK, STEPS = 24, 16, 4, 6
CURVE = "0.3@0,1.2@1"
PLACES = ("one", "two")
STRENGTHS = {"ink": 0.8, "wash": -0.3, "glow": 0.5}
FLOAT_ERROR = 1e-6  # of float32 sums of order 1
DENSE = ("LoHa", "LoKr", "Full")
BOUND = ("OFT", "GLoRA", "DoRA of outputs")
"""What they add depends on the weight."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Toy(nn.Module):
    """Two layers where LoRAs act."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for place in PLACES:
            self.add_module(place, nn.Linear(IN, OUT, bias=False, dtype=dtype).requires_grad_(False))

    def forward(self, x):
        return self.one(x) + self.two(x)


def factors(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    shapes = {"lora_up.weight": (OUT, RANK), "lora_down.weight": (RANK, IN)}
    places = [f"lora_{part}_{place}" for part in ("unet", "te1") for place in PLACES]
    return {
        f"{place}.{role}": torch.randn(shape, generator=generator) * 0.3
        for place in places
        for role, shape in shapes.items()
    }


def write_loras(folder: Path) -> Path:
    for name in (*STRENGTHS, "move", "other"):
        save_tensors(folder / f"{name}.safetensors", factors(name), {})
    for family in (*DENSE, *BOUND):
        tensors = {
            f"lora_unet_{place}.{role}": tensor
            for seed, place in enumerate(PLACES)
            for role, tensor in family_tensors(family, (OUT, IN), seed).items()
        }
        save_tensors(folder / f"{family}.safetensors", tensors, {})
    return folder


def make_session(folder: Path, dtype: torch.dtype = torch.float32, **options) -> tuple[dict[str, Toy], LoraSession]:
    torch.manual_seed(1)
    parts = {"unet": Toy(dtype), "te1": Toy(dtype)}
    return parts, LoraSession(parts, LoraCatalog([folder]), **options)


def prompt(moving: str = f"<lora:move:te=1:unet={CURVE}>") -> str:
    return "".join(f"<lora:{name}:{strength}>" for name, strength in STRENGTHS.items()) + moving


def by_hand(moving: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    return [(name, strength, strength) for name, strength in STRENGTHS.items()] + moving


def weights(part: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in part.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def set_by_hand(make, dtype, moving, **options) -> dict[str, torch.Tensor]:
    parts, session = make(dtype, **options)
    session.set(by_hand(moving))
    return weights(parts["unet"])


def oracle(base: torch.Tensor, place: str, strengths: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """base + Σ strength · up @ down in float64, and how far from it three roundings can be.

    What stays is rounded, the product that moves may be, and the sum of both. Each rounding is off by half a unit in
    the last place of its result. Where the GEMM is one of halves, its factors were rounded too, twice with their
    strength, each time by half a unit of the product.
    """
    eps = torch.finfo(base.dtype).eps
    held, moving, size = base.double(), torch.zeros(OUT, IN, dtype=torch.float64), 0.0
    for name, strength in strengths.items():
        up, down = (factors(name)[f"lora_unet_{place}.lora_{role}.weight"].double() for role in ("up", "down"))
        if name in STRENGTHS:
            held = held + strength * up @ down
        else:
            moving += strength * up @ down
        size = size + abs(strength) * up.abs() @ down.abs()
    total = held + moving
    rounded = held.abs() + moving.abs() + total.abs()
    return total, eps / 2 * rounded * 1.01 + 1.5 * eps * size * has_half_gemm(base.dtype) + FLOAT_ERROR


def has_half_gemm(dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and numerics.has_native_gemm(dtype, "cpu")


def check(unet: nn.Module, base: dict[str, torch.Tensor], strengths: dict[str, float]) -> None:
    for place in PLACES:
        total, allowed = oracle(base[f"{place}.weight"], place, strengths)
        assert ((unet.get_submodule(place).weight.double() - total).abs() <= allowed).all()
