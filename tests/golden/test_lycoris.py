"""Every algorithm of LyCORIS, trained by its own modules' definition: what a file makes of a weight equals theirs."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from tests.family_files import (
    BF16_GEMM,
    DELTA_ERROR,
    KEYS,
    ROUNDINGS,
    STRENGTHS,
    WEIGHTS,
    fused,
    relative,
    terms_of,
    toys,
    units_off,
    write,
)

FAMILIES = {
    "LoRA": (LoConModule, {"alpha": 2}),
    "LoRA without alpha": (LoConModule, {"alpha": None}),
    "LoRA Tucker": (LoConModule, {"alpha": 2, "use_tucker": True}),
    "LoRA rank stabilised": (LoConModule, {"alpha": 2, "rs_lora": True}),
    "LoRA with a scalar": (LoConModule, {"alpha": 2, "use_scalar": True}),
    "LoHa": (LohaModule, {"alpha": 2}),
    "LoHa Tucker": (LohaModule, {"alpha": 2, "use_tucker": True}),
    "LoHa with a scalar": (LohaModule, {"alpha": 2, "use_scalar": True, "rs_lora": True}),
    "LoKr": (LokrModule, {"alpha": 2, "lora_dim": 2}),
    "LoKr whole": (LokrModule, {"alpha": 2, "full_matrix": True}),
    "LoKr both factored": (LokrModule, {"alpha": 1, "lora_dim": 1, "decompose_both": True}),
    "LoKr Tucker": (LokrModule, {"alpha": 1, "lora_dim": 1, "use_tucker": True, "factor": 2}),
    "LoKr unbalanced": (LokrModule, {"alpha": 3, "lora_dim": 2, "factor": 2, "unbalanced_factorization": True}),
    "LoKr with a scalar": (LokrModule, {"alpha": 1, "lora_dim": 2, "use_scalar": True}),
    "Full": (FullModule, {}),
    "IA3 of outputs": (IA3Module, {}),
    "IA3 of inputs": (IA3Module, {"train_on_input": True}),
    "OFT": (DiagOFTModule, {}),
    "OFT constrained": (DiagOFTModule, {"constraint": 2**-6, "lora_dim": 8}),
    "OFT rescaled": (DiagOFTModule, {"rescaled": True}),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 8}),
    "BOFT constrained and rescaled": (ButterflyOFTModule, {"constraint": 2**-6, "rescaled": True, "lora_dim": 8}),
    "GLoRA": (GLoRAModule, {"alpha": 2}),
    "DoRA of outputs": (LoConModule, {"alpha": 2, "weight_decompose": True}),
    "DoRA of inputs": (LoConModule, {"alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    "DoRA Tucker": (LoConModule, {"alpha": 2, "weight_decompose": True, "use_tucker": True}),
    "DoRA of LoHa": (LohaModule, {"alpha": 2, "weight_decompose": True}),
    "DoRA of LoKr, inputs": (LokrModule, {"alpha": 2, "lora_dim": 2, "weight_decompose": True, "wd_on_out": False}),
}
SINGLE = (DiagOFTModule, ButterflyOFTModule)
"""Their inverse is in float32 always, so the reference is too."""


def reference_layer(base: Tensor, precision: torch.dtype, bias: Tensor | None = None) -> nn.Module:
    """A layer of its own with the weight `base`; a convolution without padding, so that one output is one product."""
    out, columns, *kernel = base.shape
    has_bias = bias is not None
    layer = nn.Conv2d(columns, out, kernel, bias=has_bias) if kernel else nn.Linear(columns, out, bias=has_bias)
    layer.requires_grad_(False).to(precision).weight.copy_(base)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def trained(family: str, base: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> nn.Module:
    """LyCORIS' module on a layer, its parameters random numbers of `dtype`, which a file of that type holds exactly."""
    kind, options = FAMILIES[family]
    precision = torch.float32 if kind in SINGLE else torch.float64
    module = kind("x", reference_layer(base, precision, bias), **{"lora_dim": 4} | options).to(precision)
    generator = torch.Generator().manual_seed(len(family))
    for name, parameter in module.requires_grad_(False).named_parameters():
        numbers = torch.randn(parameter.shape, generator=generator) * 0.3
        if name in ("dora_scale", "rescale"):
            numbers = 1 + numbers
        parameter.copy_(torch.tensor(0.5) if name == "scalar" else numbers.to(dtype))
    if kind is FullModule:
        module.apply_to()  # before that its state dict is the difference to the weight, of what is a difference already
    return module


def merged(module: nn.Module, shape: torch.Size, strength: float) -> tuple[Tensor, Tensor]:
    """Weight and bias, read off the outputs for unit inputs.

    `get_merged_weight` can not be asked: LoHa's and LoKr's multiply by alpha / rank twice, their forward once.
    """
    module.multiplier = strength
    count = shape[1:].numel()
    precision = next(module.parameters()).dtype
    outputs = module(torch.eye(count, dtype=precision).view(count, *shape[1:]))
    bias = module(torch.zeros(1, *shape[1:], dtype=precision))
    return (outputs - bias).flatten(1).t().reshape(shape), bias.flatten()


def reference(module: nn.Module, base: Tensor, strength: float) -> Tensor:
    """What a strength makes of the weight: W + strength · (W' - W).

    LyCORIS does that itself for most. At a strength other than 1 its DoRA leaves V = W + ΔW, its OFT leaves the
    rescale whole, and its BOFT moves every stage: there the line to its own result at 1 is meant, as in the WebUI and
    ComfyUI.
    """
    bends = isinstance(module, SINGLE) or getattr(module, "wd", False)
    if not bends:
        return merged(module, base.shape, strength)[0]
    return base + strength * (merged(module, base.shape, 1.0)[0] - base.to(next(module.parameters()).dtype))


def file_tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = module.state_dict()
    return {name: tensor if name == "on_input" else tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_weight_is_the_one_lycoris_computes(tmp_path, family, kind, dtype):
    components = toys(dtype)
    base = weight_of(components, kind)
    module = trained(family, base, dtype)
    path = write(tmp_path / "x.safetensors", {kind: file_tensors(module, dtype)})
    exact_base = base.to(next(module.parameters()).dtype)
    for strength in STRENGTHS:
        found = terms_of(path, components, strength)
        if strength == 0.0:
            assert not found
            continue
        weight, terms = found[KEYS[kind]]
        assert weight.data_ptr() == base.data_ptr()
        expected = reference(module, exact_base, strength)
        limit = BF16_GEMM if dtype == torch.bfloat16 and module.name == "locon" else ROUNDINGS[dtype]
        assert units_off(fused(base, terms), expected) <= limit
        delta = strength * terms[0].adapter.delta_weight(base)
        assert relative(delta, expected - exact_base) < DELTA_ERROR


def weight_of(components: dict[str, nn.Module], kind: str) -> Tensor:
    if kind == "rows":
        return components["te1"].transformer.resblocks[0].attn.in_proj_weight[16:32]
    return {"linear": components["unet"].linear, "1x1": components["unet"].conv1, "3x3": components["unet"].conv3}[
        kind
    ].weight


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_the_bias_of_full_is_fused_too(tmp_path, kind, dtype):
    components = toys(dtype)
    layer = {"linear": components["unet"].linear, "3x3": components["unet"].conv3}[kind]
    module = trained("Full", layer.weight, dtype, layer.bias)
    path = write(tmp_path / "x.safetensors", {kind: file_tensors(module, dtype)})
    for strength in STRENGTHS[1:]:
        found = terms_of(path, components, strength)
        assert found.keys() == {KEYS[kind], f"{KEYS[kind]}.bias"}
        bias, terms = found[f"{KEYS[kind]}.bias"]
        assert bias.data_ptr() == layer.bias.data_ptr()
        expected = merged(module, layer.weight.shape, strength)[1]
        assert units_off(fused(bias, terms), expected) <= ROUNDINGS[dtype]


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("kind", ["layer norm", "group norm"])
def test_weight_and_bias_of_a_norm_are_those_that_lycoris_computes(tmp_path, kind, dtype):
    components = toys(dtype)
    layer = {"layer norm": components["unet"].norm, "group norm": components["unet"].group}[kind]
    wide = nn.LayerNorm(24) if kind == "layer norm" else nn.GroupNorm(4, 24)
    wide.double().load_state_dict(layer.state_dict())
    module = NormModule("x", wide).double().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_((torch.randn(24, generator=torch.Generator().manual_seed(3)) * 0.3).to(dtype))
    path = write(tmp_path / "x.safetensors", {kind: file_tensors(module, dtype)})
    for strength in STRENGTHS[1:]:
        found = terms_of(path, components, strength)
        expected = module.get_merged_weight(strength)
        for key, exact in zip((KEYS[kind], f"{KEYS[kind]}.bias"), expected, strict=True):
            assert units_off(fused(*found[key]), exact) <= ROUNDINGS[dtype]


def test_lycoris_scales_twice_where_it_is_not_asked():
    """The reason for reading outputs: if this fails, the reference has been mended."""
    base = toys()["unet"].linear.weight
    module = trained("LoKr", base, torch.float32)
    module.scale = 3.0
    twice, _ = module.get_diff_weight(1.0, base.shape)
    assert relative(twice, 3.0 * (merged(module, base.shape, 1.0)[0] - base)) < DELTA_ERROR
