"""Merged checkpoints against those of kohya's merge_lora.py, and against sums in float64."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lib_lora.tools.given import given_files
from lib_lora.tools.merge import merge_loras
from tests.golden.kohya_model import HERE, unet_keys

FLOAT_ERROR = 1e-6  # absolute, of float32 weights up to 4
FP16_ULP = 2**-10
ORACLE_ERROR = 2**-21  # in units of the largest weight: one rounding of float32, and a sum over the ranks
PRECISION_ERROR = {"fp16": 1e-3, "bf16": 8e-3}  # of each step rounded to that type

CASES = {
    "merge1_float": (["lora_A:0.8"], {}),
    "merge1_fp16": (["lora_A:0.8"], {"precision": "fp16", "save_precision": "fp16"}),
    "merge2_float_savefp16": (["lora_A:0.8", "lora_D_c3lier:0.5"], {"save_precision": "fp16"}),
}


def merged(tmp_path, loras: list[str], **options) -> dict[str, torch.Tensor]:
    given = given_files(f"{HERE}/{lora.replace(':', '.safetensors:', 1)}" for lora in loras)
    out = tmp_path / "out.safetensors"
    merge_loras(HERE / "base.safetensors", given, out, overwrite=True, **options)
    return load_file(out)


def kohya_name(prefix: str, name: str) -> str:
    return f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"


def sums(loras: list[str]) -> dict[str, torch.Tensor]:
    """W0 + Σ strength · alpha / rank · up @ down in float64, layers named with kohya's own table."""
    tensors = load_file(HERE / "base.safetensors")
    total = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
    keys = {kohya_name("lora_unet", name): key for key, name in unet_keys().items()}
    text_encoder = "cond_stage_model.transformer."
    keys |= {kohya_name("lora_te", key.removeprefix(text_encoder)): key for key in total if text_encoder in key}
    for lora in loras:
        file, _, strength = lora.partition(":")
        factors = load_file(HERE / f"{file}.safetensors")
        for down in (name for name in factors if name.endswith(".lora_down.weight")):
            module = down.removesuffix(".lora_down.weight")
            low, high = factors[down].double(), factors[f"{module}.lora_up.weight"].double()
            scale = float(strength) * factors[f"{module}.alpha"].double().item() / low.shape[0]
            weight = total[keys[module]]
            total[keys[module]] = weight + scale * (high.flatten(1) @ low.flatten(1)).view(weight.shape)
    return total


@pytest.mark.parametrize("name", CASES)
def test_a_merged_checkpoint_is_kohyas(tmp_path, name):
    loras, options = CASES[name]
    ours, theirs = merged(tmp_path, loras, **options), load_file(HERE / f"{name}.safetensors")
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in ours.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in theirs.items()
    }
    for key, tensor in ours.items():
        expected = theirs[key].double()
        step = expected.abs().clamp_min(2**-14) * FP16_ULP
        allowed = {"merge1_float": torch.tensor(FLOAT_ERROR), "merge1_fp16": torch.tensor(0.0)}.get(name, step)
        assert ((tensor.double() - expected).abs() <= allowed).all(), key


@pytest.mark.parametrize("loras", [["lora_A:0.8"], ["lora_E_c3lier:-0.4", "lora_B:1.5", "lora_D_c3lier:0.7"]])
def test_a_merge_is_the_sum_in_float64_rounded_once(tmp_path, loras):
    exact, rounded = sums(loras), merged(tmp_path, loras, save_precision="fp16")
    for key, tensor in merged(tmp_path, loras).items():
        if key in exact:
            slack = ORACLE_ERROR * exact[key].abs().max()
            step = exact[key].abs().clamp_min(2**-14) * FP16_ULP
            assert ((tensor.double() - exact[key]).abs() <= slack).all(), key
            if "alphas" not in key:
                assert ((rounded[key].double() - exact[key]).abs() <= step / 2 + slack).all(), key


@pytest.mark.parametrize("precision", PRECISION_ERROR)
def test_a_narrow_calculation_is_off_by_its_roundings_alone(tmp_path, precision):
    exact = sums(["lora_A:0.8"])
    ours = merged(tmp_path, ["lora_A:0.8"], precision=precision)
    errors = [(tensor.double() - exact[key]).abs().max().item() for key, tensor in ours.items() if key in exact]
    assert PRECISION_ERROR[precision] / 100 < max(errors) < PRECISION_ERROR[precision]
    base = load_file(HERE / "base.safetensors")
    assert {tensor.dtype for tensor in ours.values()} == {tensor.dtype for tensor in base.values()}
