"""LoRA files of every algorithm on a small model with a layer of every kind, for tests of the adapters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_lora.core.keymap import KeyMap
from lib_lora.core.network import load_network
from lib_lora.core.numerics import Term, fuse_layer
from lib_lora.core.plan import Scale, make_plan, match_network

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

STRENGTHS = (0.0, 0.5, 1.0, -0.7)
DELTA_ERROR = 1e-6
"""Of a float32 ΔW, relative to its norm."""
ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ROUNDINGS = {torch.float32: 64, torch.float16: 0.51, torch.bfloat16: 0.51}
"""Largest error of a fused weight in units of its last place: one rounding is half a unit; fp32 has no wider sum, and
terms cancel."""
BF16_GEMM = 4
"""The same where one bf16 GEMM multiplies factors that were scaled in bf16, and terms cancel."""

NAMES = {
    "linear": "lora_unet_linear",
    "1x1": "lora_unet_conv1",
    "3x3": "lora_unet_conv3",
    "layer norm": "lora_unet_norm",
    "group norm": "lora_unet_group",
    "rows": "lora_te1_text_model_encoder_layers_0_self_attn_k_proj",
}
"""Kind of layer → its name in kohya's layout."""
WEIGHTS = ("linear", "1x1", "3x3", "rows")
KEYS = {
    "linear": "unet.linear",
    "1x1": "unet.conv1",
    "3x3": "unet.conv3",
    "layer norm": "unet.norm",
    "group norm": "unet.group",
    "rows": "te1.text_model.encoder.layers.0.self_attn.k_proj",
}


class Holder(nn.Module):
    """A module under a name."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Toy(nn.Module):
    """A layer of every kind, in a row; 24 outputs everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(8, 24, 3)
        self.group = nn.GroupNorm(4, 24)
        self.conv1 = nn.Conv2d(24, 16, 1)
        self.linear = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(self.group(self.conv3(x)))
        return self.norm(self.linear(hidden.flatten(2).transpose(1, 2)))


def toys(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Module]:
    """Toy, and a text encoder in open_clip's structure with q, k and v in one weight; all numbers random."""
    block = Holder(attn=nn.MultiheadAttention(16, 2), mlp=Holder(c_fc=nn.Linear(16, 32)))
    components = {"unet": Toy(), "te1": Holder(transformer=Holder(resblocks=nn.Sequential(block)))}
    generator = torch.Generator().manual_seed(seed)
    for module in components.values():
        module.to(dtype).eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return components


def write(path: Path, layers: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str] | None = None) -> Path:
    """A file in kohya's layout.

    Args:
        path: Where.
        layers: Kind of layer, or a whole name → suffix → tensor.
        metadata: Of the header.
    """
    tensors = {
        f"{NAMES.get(layer, layer)}.{suffix}": tensor.detach().clone(memory_format=torch.contiguous_format)
        for layer, parts in layers.items()
        for suffix, tensor in parts.items()
    }
    save_file(tensors, path, metadata=dict(metadata or {}))
    return path


def terms_of(path: Path, components: Mapping[str, nn.Module], strength: float) -> dict[str, tuple[Tensor, list[Term]]]:
    """Layer key → its live weight and what the file adds to it, by way of name, shape and plan."""
    match = match_network(KeyMap.from_modules(dict(components)), load_network(path))
    plan = make_plan([(match, Scale(strength, strength))])
    return {key: (patch.layer.live(), list(patch.terms)) for key, patch in plan.patches.items()}


def fused(base: Tensor, terms: list[Term], dtype: torch.dtype | None = None) -> Tensor:
    out = torch.empty_like(base, dtype=dtype or base.dtype)
    fuse_layer(base, terms, out)
    return out


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()


def units_off(ours: Tensor, exact: Tensor) -> float:
    """Largest error in units of the last place."""
    unit = exact.double().abs().clamp_min(0.05) * ULP[ours.dtype]
    return ((ours.double() - exact.double()).abs() / unit).max().item()


def noise(generator: torch.Generator, *shape: int, std: float = 0.3) -> Tensor:
    return torch.randn(shape, generator=generator) * std


def family_tensors(family: str, shape: tuple[int, ...], seed: int = 0, dtype=torch.float32) -> dict[str, Tensor]:
    """Random tensors of one layer as the family's trainer writes them: suffix → tensor.

    Args:
        family: A key of `FAMILIES`.
        shape: Of the layer's weight.
        seed: Of the numbers.
        dtype: Of the file.
    """
    tensors = FAMILIES[family](torch.Generator().manual_seed(seed), *shape)
    return {name: tensor if name == "on_input" else tensor.to(dtype) for name, tensor in tensors.items()}


def _lora(g: torch.Generator, out: int, *rest: int, rank: int = 3) -> dict[str, Tensor]:
    ones = (1,) * len(rest[1:])
    up, down = noise(g, out, rank, *ones), noise(g, rank, *rest)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.5)}


def _lora_tucker(g: torch.Generator, out: int, columns: int, *kernel: int) -> dict[str, Tensor]:
    ones = (1,) * len(kernel)
    up, down, mid = noise(g, out, 3, *ones), noise(g, 3, columns, *ones), noise(g, 3, 3, *(kernel or (1, 1)))
    return {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid, "alpha": torch.tensor(6.0)}


def _loha(g: torch.Generator, out: int, *rest: int) -> dict[str, Tensor]:
    tensors = {}
    for half in ("w1", "w2"):
        tensors |= {f"hada_{half}_a": noise(g, out, 4), f"hada_{half}_b": noise(g, 4, math.prod(rest))}
    return tensors | {"alpha": torch.tensor(2.0)}


def _loha_tucker(g: torch.Generator, out: int, columns: int, *kernel: int) -> dict[str, Tensor]:
    tensors = {}
    for number in "12":
        tensors |= {f"hada_w{number}_a": noise(g, 4, out), f"hada_w{number}_b": noise(g, 4, columns)}
        tensors |= {f"hada_t{number}": noise(g, 4, 4, *(kernel or (1, 1)))}
    return tensors | {"alpha": torch.tensor(8.0)}


def _lokr(g: torch.Generator, out: int, columns: int, *kernel: int) -> dict[str, Tensor]:
    w2 = {"lokr_w2_a": noise(g, out // 4, 2), "lokr_w2_b": noise(g, 2, math.prod((columns // 4, *kernel)))}
    return {"lokr_w1": noise(g, 4, 4), **w2, "alpha": torch.tensor(1.0)}


def _lokr_whole(g: torch.Generator, out: int, columns: int, *kernel: int) -> dict[str, Tensor]:
    w1, w2 = noise(g, 2, 4), noise(g, out // 2, columns // 4, *kernel)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}


def _lokr_both(g: torch.Generator, out: int, columns: int, *kernel: int) -> dict[str, Tensor]:
    w1 = {"lokr_w1_a": noise(g, 4, 2), "lokr_w1_b": noise(g, 2, 2)}
    if not kernel:
        w2 = {"lokr_w2_a": noise(g, out // 4, 2), "lokr_w2_b": noise(g, 2, columns // 2)}
    else:
        w2 = {"lokr_w2_a": noise(g, 2, out // 4), "lokr_w2_b": noise(g, 2, columns // 2)}
        w2 |= {"lokr_t2": noise(g, 2, 2, *kernel)}
    return w1 | w2 | {"alpha": torch.tensor(3.0)}


def _oft(g: torch.Generator, out: int, *rest: int) -> dict[str, Tensor]:
    return {"oft_blocks": noise(g, 4, out // 4, out // 4), "alpha": torch.tensor(0.0)}


def _oft_rescaled(g: torch.Generator, out: int, *rest: int) -> dict[str, Tensor]:
    rescale = 1 + noise(g, out, *(1,) * len(rest))
    return {"oft_blocks": noise(g, 2, out // 2, out // 2), "alpha": torch.tensor(0.05), "rescale": rescale}


def _oft_diag(g: torch.Generator, out: int, *rest: int) -> dict[str, Tensor]:
    turns, _ = torch.linalg.qr(noise(g, out // 4, 4, 4))
    return {"oft_diag": turns}


def _boft(g: torch.Generator, out: int, *rest: int) -> dict[str, Tensor]:
    rescale = 1 + noise(g, out, *(1,) * len(rest))
    return {"oft_blocks": noise(g, 2, out // 4, 4, 4), "alpha": torch.tensor(0.0), "rescale": rescale}


def _glora(g: torch.Generator, out: int, columns: int, *kernel: int) -> dict[str, Tensor]:
    ones = (1,) * len(kernel)
    inner = {"a1.weight": noise(g, columns, 3, *ones), "a2.weight": noise(g, 3, columns, *ones)}
    outer = {"b1.weight": noise(g, out, 3, *ones), "b2.weight": noise(g, 3, columns, *kernel)}
    return inner | outer | {"alpha": torch.tensor(1.5)}


def _glora_old(g: torch.Generator, out: int, columns: int, *kernel: int) -> dict[str, Tensor]:
    new = _glora(g, out, columns, *kernel)
    turned = (("a1", "a2"), ("a2", "a1"), ("b1", "b2"), ("b2", "b1"))
    return {f"{old}.weight": new[f"{name}.weight"] for old, name in turned} | {"alpha": torch.tensor(3.0)}


def _ia3(g: torch.Generator, channels: int, on_input: bool, kernel: tuple[int, ...]) -> dict[str, Tensor]:
    weight = noise(g, *((1, channels, 1, 1) if kernel else (channels,)))
    return {"weight": weight, "on_input": torch.tensor(int(on_input))}


def _magnitude(g: torch.Generator, *shape: int) -> dict[str, Tensor]:
    return {"dora_scale": 0.5 + torch.rand(shape, generator=g)}


FAMILIES = {
    "LoRA": _lora,
    "LoRA Tucker": _lora_tucker,
    "LoHa": _loha,
    "LoHa Tucker": _loha_tucker,
    "LoKr": _lokr,
    "LoKr whole": _lokr_whole,
    "LoKr both factored": _lokr_both,
    "Full": lambda g, *shape: {"diff": noise(g, *shape)},
    "IA3 of outputs": lambda g, out, columns, *kernel: _ia3(g, out, False, kernel),
    "IA3 of inputs": lambda g, out, columns, *kernel: _ia3(g, columns, True, kernel),
    "OFT": _oft,
    "OFT rescaled": _oft_rescaled,
    "OFT of the first layout": _oft_diag,
    "BOFT": _boft,
    "GLoRA": _glora,
    "GLoRA of the first layout": _glora_old,
    "DoRA of outputs": lambda g, out, *rest: _lora(g, out, *rest) | _magnitude(g, out, *(1,) * len(rest)),
    "DoRA of inputs": lambda g, out, columns, *kernel: (
        _lora(g, out, columns, *kernel) | _magnitude(g, 1, columns, *(1,) * len(kernel))
    ),
    "DoRA of LoHa": lambda g, out, *rest: _loha(g, out, *rest) | _magnitude(g, out, *(1,) * len(rest)),
    "DoRA of LoKr": lambda g, out, columns, *kernel: (
        _lokr(g, out, columns, *kernel) | _magnitude(g, 1, columns, *(1,) * len(kernel))
    ),
}
"""Family → tensors of a weight (out, in[, kh, kw]) by suffix."""
