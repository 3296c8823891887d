"""Tools that make LoRAs of LoRAs, against what kohya's scripts made of the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora.core.files import read_lora_file
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.resize import resize

HERE = Path(__file__).parent / "sd1"
RESIZE_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3}
"""Of alpha / rank · up @ down, relative to its norm."""

RESIZED = {
    "resize_E_r4": RankRule(4, kohya=True),
    "resize_E_svratio2_savefp16": RankRule(8, dynamic="sv_ratio", parameter=2.0, kohya=True),
}


def product(tensors, name: str) -> torch.Tensor:
    up, down = (tensors[f"{name}.lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
    return tensors[f"{name}.alpha"].double() / up.shape[1] * up @ down


def layers(tensors) -> list[str]:
    return [key.removesuffix(".lora_down.weight") for key in tensors if key.endswith(".lora_down.weight")]


@pytest.mark.parametrize("name", RESIZED)
def test_resized_layers_have_kohyas_ranks_and_products(tmp_path, name):
    theirs = load_file(HERE / f"{name}.safetensors")
    dtype = next(iter(theirs.values())).dtype
    outcome = resize(HERE / "lora_E_c3lier.safetensors", tmp_path / "a.safetensors", RESIZED[name], dtype=dtype)
    ours = load_file(tmp_path / "a.safetensors")
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in ours.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in theirs.items()
    }
    assert len(outcome.layers) == len(layers(theirs)) == 296
    for layer in layers(theirs):
        exact = product(theirs, layer)
        assert (product(ours, layer) - exact).norm() <= RESIZE_ERROR[dtype] * exact.norm(), layer


@pytest.mark.parametrize("name", RESIZED)
def test_resized_files_say_what_kohyas_say(tmp_path, name):
    path = tmp_path / "a.safetensors"
    theirs = read_lora_file(HERE / f"{name}.safetensors").metadata
    resize(HERE / "lora_E_c3lier.safetensors", path, RESIZED[name], dtype=load_file_dtype(name))
    ours = read_lora_file(path).metadata
    stale = {"ss_network_args", "sshs_model_hash"}  # theirs say the old rank of convolutions, and hash other bytes
    assert {key: ours[key] for key in theirs if key not in stale} == {k: v for k, v in theirs.items() if k not in stale}


def load_file_dtype(name: str) -> torch.dtype:
    return next(iter(load_file(HERE / f"{name}.safetensors").values())).dtype
