"""Extraction of a LoRA against the file that kohya's extract_lora_from_models.py made of the same two checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_lora.core.files import read_header
from lib_lora.tools.extract import extract
from tests.golden.kohya_model import HERE, checkpoint, unet_keys

RANK = 4
KOHYAS_CLAMP = 0.99
RECIPE_ERROR = 1e-3  # relative, of the product
NOT_WORSE, ROUNDING = 1.05, 1e-6
BEST_ERROR = 1.001


def layer_of(key: str) -> str:
    """kohya's name of the layer of a checkpoint's weight."""
    path = unet_keys().get(key)
    prefix, path = ("lora_unet_", path) if path else ("lora_te_", key.removeprefix("cond_stage_model.transformer."))
    return prefix + path.removesuffix(".weight").replace(".", "_")


def delta(lora: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    up, down = (lora[f"{layer}.lora_{role}.weight"].double().flatten(1) for role in ("up", "down"))
    return lora[f"{layer}.alpha"].item() / down.shape[0] * up @ down


@pytest.fixture(scope="module")
def theirs():
    return load_file(HERE / "ext_d4_c4.safetensors")


def kohyas_product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """up @ down as kohya's merge_lora.py computes it, bit for bit."""
    if down.shape[2:].numel() > 1:
        return torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    return (up.flatten(1) @ down.flatten(1)).reshape(*up.shape[:1], *down.shape[1:])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """What kohya's was extracted of: the base with 0.8 of LoRA A (kohya's own merge) and 0.5 of LoRA D."""
    lora = {key: tensor.float() for key, tensor in load_file(HERE / "lora_D_c3lier.safetensors").items()}
    weights = checkpoint("merge1_float")
    for key, weight in weights.items():
        if alpha := lora.get(f"{layer_of(key)}.alpha"):
            up, down = (lora[f"{layer_of(key)}.lora_{role}.weight"] for role in ("up", "down"))
            weights[key] = weight + 0.5 * kohyas_product(up, down) * (alpha / down.shape[0])
    path = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def changes(tuned):
    """Layer → tuned - base in float64, of all layers that kohya extracts."""
    base, after = checkpoint(), load_file(tuned)
    names = {layer_of(key): key for key in base if base[key].ndim > 1}
    return {name: (after[key].double() - base[key].double()).flatten(1) for name, key in names.items()}


def extracted(tuned, folder, **options) -> dict[str, torch.Tensor]:
    extract(HERE / "base.safetensors", tuned, folder / "ours.safetensors", rank=RANK, **options)
    return load_file(folder / "ours.safetensors")


def layers(lora: dict[str, torch.Tensor]) -> list[str]:
    return sorted(key.removesuffix(".alpha") for key in lora if key.endswith(".alpha"))


def error(change: torch.Tensor, approximation: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(change - approximation).item()


def test_names_shapes_and_types_are_kohyas(tuned, theirs, tmp_path):
    ours = extracted(tuned, tmp_path, conv_rank=RANK)
    kinds = [{key: (tensor.shape, tensor.dtype) for key, tensor in lora.items()} for lora in (ours, theirs)]
    assert kinds[0] == kinds[1]


def test_what_the_file_says_is_what_kohyas_says(tuned, tmp_path):
    extracted(tuned, tmp_path, conv_rank=RANK)
    ours, said = (
        read_header(file).metadata for file in (tmp_path / "ours.safetensors", HERE / "ext_d4_c4.safetensors")
    )
    for key in ("ss_network_module", "ss_network_dim", "ss_network_alpha"):
        assert ours[key] == said[key], key
    arguments = [json.loads(metadata["ss_network_args"]) for metadata in (ours, said)]
    assert arguments[0] == arguments[1]
    assert ours["modelspec.title"] == "ours"
    assert {"sshs_model_hash", "sshs_legacy_hash", "modelspec.date"} <= ours.keys()


@pytest.mark.newest  # the result depends on the signs of the vectors, which are LAPACK's choice
def test_clamped_factors_make_kohyas_product(tuned, theirs, tmp_path):
    ours = extracted(tuned, tmp_path, conv_rank=RANK, clamp=KOHYAS_CLAMP)
    for layer in layers(theirs):
        product = delta(theirs, layer)
        assert error(product, delta(ours, layer)) <= RECIPE_ERROR * torch.linalg.matrix_norm(product), layer


@pytest.mark.parametrize("clamp", [None, pytest.param(KOHYAS_CLAMP, marks=pytest.mark.newest)])
def test_no_layer_is_worse_than_kohyas(tuned, theirs, changes, tmp_path, clamp):
    ours = extracted(tuned, tmp_path, conv_rank=RANK, clamp=clamp)
    for layer in layers(theirs):
        own, other = (error(changes[layer], delta(lora, layer)) for lora in (ours, theirs))
        assert own <= NOT_WORSE * other + ROUNDING, layer


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_without_clamping_the_error_is_the_least_of_the_rank(tuned, changes, tmp_path, dtype, rounding):
    ours = extracted(tuned, tmp_path, conv_rank=RANK, dtype=dtype)
    for layer in layers(ours):
        values = torch.linalg.svdvals(changes[layer])
        best = torch.linalg.vector_norm(values[RANK:]).item()
        assert error(changes[layer], delta(ours, layer)) <= BEST_ERROR * best + rounding * values.norm(), layer


def test_without_a_rank_for_convolutions_only_lierlas_layers_are_extracted(tuned, tmp_path):
    ours = extracted(tuned, tmp_path)
    assert layers(ours) == layers(load_file(HERE / "lora_A.safetensors"))
    assert "ss_network_args" not in read_header(tmp_path / "ours.safetensors").metadata


def test_a_large_smallest_difference_leaves_the_text_encoder_out_and_nothing_else(tuned, theirs, tmp_path):
    ours = extracted(tuned, tmp_path, conv_rank=RANK, min_diff=100)
    assert layers(ours) == [layer for layer in layers(theirs) if layer.startswith("lora_unet_")]
