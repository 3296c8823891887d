"""Algorithms of PEFT: what its file makes of a weight equals its own merge."""

from __future__ import annotations

import json

import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_lora.core.network import load_network
from lib_lora.errors import AdapterError
from tests.family_files import (
    BF16_GEMM,
    DELTA_ERROR,
    KEYS,
    ROUNDINGS,
    STRENGTHS,
    WEIGHTS,
    Holder,
    fused,
    relative,
    terms_of,
    toys,
    units_off,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
"""PEFT's remarks on models that are not transformers', and on biases, which it takes for a fault in its own file."""

FAMILIES = {
    "LoRA": (LoraConfig, {"lora_alpha": 4}),
    "LoRA with a bias": (LoraConfig, {"lora_alpha": 4, "lora_bias": True}),
    "DoRA": (LoraConfig, {"lora_alpha": 4, "use_dora": True}),
    "LoHa": (LoHaConfig, {"alpha": 4}),
    "LoHa Tucker": (LoHaConfig, {"alpha": 4, "use_effective_conv2d": True}),
    "LoKr": (LoKrConfig, {"r": 2, "alpha": 2}),
    "LoKr both factored": (LoKrConfig, {"r": 1, "alpha": 1, "decompose_both": True}),
    "LoKr Tucker": (LoKrConfig, {"r": 1, "alpha": 1, "decompose_factor": 2, "use_effective_conv2d": True}),
    "IA3": (IA3Config, {"feedforward_modules": []}),
}
PATHS = {"linear": "linear", "1x1": "conv1", "3x3": "conv3", "rows": "text_model.encoder.layers.0.self_attn.k_proj"}


def layer_of(kind: str, components: dict[str, nn.Module]) -> nn.Module:
    """The layer alone, in float64; of a fused weight's rows a Linear with their numbers."""
    unet = components["unet"]
    if kind != "rows":
        return getattr(unet, PATHS[kind]).double()
    attention = components["te1"].transformer.resblocks[0].attn
    layer = nn.Linear(16, 16).double().requires_grad_(False)
    layer.weight.copy_(attention.in_proj_weight[16:32])
    layer.bias.copy_(attention.in_proj_bias[16:32])
    return layer


def adapted(config: type, options: dict, kind: str, dtype: torch.dtype, path, metadata=None) -> tuple[Tensor, ...]:
    """Random parameters of `dtype` in PEFT's adapter of one layer, written to `path`; its merged weight and bias.

    Returns:
        Weight and bias before, weight and bias after, in float64.
    """
    layer = layer_of(kind, toys(dtype))
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    settings = {"target_modules": ["layer"], **({} if config is IA3Config else {"r": 4}), **options}
    model = get_peft_model(Holder(layer=layer), config(**settings)).double()
    generator = torch.Generator().manual_seed(len(kind))
    for name, parameter in model.requires_grad_(False).named_parameters():
        if "base_layer" not in name:
            start = 1.0 if "magnitude" in name or "ia3" in name else 0.0
            parameter.copy_((start + 0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype))
    tensors = get_peft_model_state_dict(model)
    names = {key: key.replace("base_model.model.layer", f"base_model.model.{PATHS[kind]}") for key in tensors}
    save_file({names[key]: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    after = model.merge_and_unload().layer
    return *before, after.weight.detach(), after.bias.detach()


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_weight_is_the_one_peft_merges(tmp_path, family, kind, dtype):
    path = tmp_path / "x.safetensors"
    weight, bias, merged_weight, merged_bias = adapted(*FAMILIES[family], kind, dtype, path)
    components = toys(dtype)
    for strength in STRENGTHS:
        found = terms_of(path, components, strength)
        if strength == 0.0:
            assert not found
            continue
        base, terms = found.pop(KEYS[kind])
        limit = BF16_GEMM if dtype == torch.bfloat16 and family.startswith("LoRA") else ROUNDINGS[dtype]
        assert units_off(fused(base, terms), weight + strength * (merged_weight - weight)) <= limit
        assert relative(terms[0].adapter.delta_weight(base), merged_weight - weight) < DELTA_ERROR
        if (merged_bias != bias).any():
            base, terms = found.pop(f"{KEYS[kind]}.bias")
            assert units_off(fused(base, terms), bias + strength * (merged_bias - bias)) <= ROUNDINGS[dtype]
        assert not found


@pytest.mark.parametrize("kind", ["linear", "rows"])
def test_ia3_of_a_feedforward_scales_the_inputs(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    options = {"feedforward_modules": ["layer"]}
    weight, _, merged_weight, _ = adapted(IA3Config, options, kind, torch.float32, path)
    base, terms = terms_of(path, toys(), 1.0)[KEYS[kind]]
    assert relative(terms[0].adapter.delta_weight(base), merged_weight - weight) < DELTA_ERROR


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"unet.lora_alpha": 2, "unet.r": 4}, 0.5),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, 4.0),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_the_alpha_that_diffusers_writes_beside_pefts_tensors_is_followed(tmp_path, dora, settings, scale):
    path = tmp_path / "x.safetensors"
    options = {"use_dora": dora, "lora_alpha": 4 * scale}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    weight, _, merged_weight, _ = adapted(LoraConfig, options, "linear", torch.float32, path, metadata)
    base, terms = terms_of(path, toys(), 1.0)[KEYS["linear"]]
    assert relative(terms[0].adapter.delta_weight(base), merged_weight - weight) < DELTA_ERROR


@pytest.mark.parametrize(
    ("config", "options", "name"),
    [
        (OFTConfig, {"oft_block_size": 4, "r": 0}, "PEFT's OFT"),
        (BOFTConfig, {"boft_block_size": 4, "r": None}, "PEFT's BOFT"),
    ],
)
def test_what_depends_on_settings_that_the_file_does_not_hold_is_refused(tmp_path, config, options, name):
    layer = nn.Linear(16, 24)
    settings = {key: value for key, value in options.items() if value is not None}
    model = get_peft_model(Holder(layer=layer), config(target_modules=["layer"], **settings))
    path = tmp_path / "turned.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(model).items()}, path)
    with pytest.raises(AdapterError, match=rf"turned: layer unet:layer: {name} .*settings that the file does not hold"):
        load_network(path)
