"""Tools that make LoRAs of LoRAs, against what kohya's scripts made of the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora.core.files import read_lora_file
from lib_lora.tools.combine import combine
from lib_lora.tools.given import given_files
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.resize import resize

HERE = Path(__file__).parent / "sd1"
RESIZE_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3}
"""Of alpha / rank · up @ down, relative to its norm."""

ADD_ERROR = 1e-6
"""Of each number of up and down."""
SVD_SLACK = 1.05
"""Of kohya's own error, plus `ADD_ERROR`."""

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


def given(first: float, second: float):
    return given_files([f"{HERE / 'lora_A.safetensors'}:{first}", f"{HERE / 'lora_B.safetensors'}:{second}"])


def added(first: float, second: float) -> dict[str, torch.Tensor]:
    """What merge_lora.py computes without a model."""
    result: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for name, ratio in (("lora_A", first), ("lora_B", second)):
        tensors = load_file(HERE / f"{name}.safetensors")
        for layer in layers(tensors):
            alpha = tensors[f"{layer}.alpha"].item()
            scale = ratio * (alpha / alphas.setdefault(layer, alpha)) ** 0.5
            for part, factor in (("up", abs(scale)), ("down", scale)):
                key = f"{layer}.lora_{part}.weight"
                result[key] = result.get(key, 0) + tensors[key].float() * factor
    return result | {f"{layer}.alpha": torch.tensor(alpha) for layer, alpha in alphas.items()}


def test_add_is_kohyas_merge_of_loras(tmp_path):
    theirs = load_file(HERE / "ll_A0.6_B0.4.safetensors")
    outcome = combine(given(0.6, 0.4), tmp_path / "a.safetensors", method="add")
    ours = load_file(tmp_path / "a.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[key] - theirs[key]).abs().max() <= ADD_ERROR for key in theirs)
    assert "no sum of effects" in outcome.notes[-1]


@pytest.mark.parametrize("strengths", [(0.6, 0.4), (0.6, -0.4), (-1.0, 2.0)])
def test_add_follows_kohyas_formula_for_either_sign(tmp_path, strengths):
    theirs = added(*strengths)
    combine(given(*strengths), tmp_path / "a.safetensors", method="add")
    ours = load_file(tmp_path / "a.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[key] - theirs[key]).abs().max() <= ADD_ERROR for key in theirs)


def test_added_files_say_what_kohyas_say(tmp_path):
    theirs = read_lora_file(HERE / "ll_A0.6_B0.4.safetensors").metadata
    combine(given(0.6, 0.4), tmp_path / "ll_A0.6_B0.4.safetensors", method="add")
    ours = read_lora_file(tmp_path / "ll_A0.6_B0.4.safetensors").metadata
    own = {"modelspec.date", "modelspec.implementation_version", "prefuse.recipe"}
    assert {key: ours[key] for key in ours.keys() - own} == {key: theirs[key] for key in theirs.keys() - own}


def test_svd_is_never_worse_than_kohyas(tmp_path):
    theirs = load_file(HERE / "svd_A0.6_B0.4_r8.safetensors")
    combine(given(0.6, 0.4), tmp_path / "a.safetensors", method="svd", rule=RankRule(8))
    ours = load_file(tmp_path / "a.safetensors")
    sources = [(load_file(HERE / f"lora_{name}.safetensors"), ratio) for name, ratio in (("A", 0.6), ("B", 0.4))]
    shapes = [{key: tensor.shape for key, tensor in made.items()} for made in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for layer in layers(theirs):
        exact = sum(ratio * product(tensors, layer) for tensors, ratio in sources)
        wrong, kohyas = ((product(made, layer) - exact).norm() for made in (ours, theirs))
        assert wrong <= SVD_SLACK * kohyas + ADD_ERROR, layer
