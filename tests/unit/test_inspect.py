"""What a file is, without a model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from toys import lierla, lora_tensors, sd1_unet, sdxl_unet, text_encoder

from lib_lora.core.adapters import Factors
from lib_lora.core.blocks import OUTSIDE
from lib_lora.core.keymap import KeyMap
from lib_lora.core.norms import factors_norm
from lib_lora.core.saving import save_tensors
from lib_lora.tools.inspect import block_of_layer, inspect_file, not_finite

GOLDEN = Path(__file__).parents[1] / "golden/sd1"
NORM_TOLERANCE = 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_the_norm_is_that_of_the_product(dtype, rank):
    generator = torch.Generator().manual_seed(rank)
    up, down = (
        torch.randn(24, rank, generator=generator).to(dtype),
        torch.randn(rank, 30, generator=generator).to(dtype),
    )
    exact = torch.linalg.matrix_norm(-0.5 * up.double() @ down.double()).item()
    assert factors_norm(Factors(up, down, -0.5)) == pytest.approx(exact, rel=NORM_TOLERANCE)


def test_an_update_that_cancels_itself_has_no_norm():
    up = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    down = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    assert factors_norm(Factors(up, down, 1.0)) == 0


@pytest.mark.parametrize("make", [sd1_unet, sdxl_unet])
def test_blocks_by_name_are_those_of_the_model(make):
    keymap = KeyMap.from_modules({"unet": make(), "te1": text_encoder()})
    for layer in keymap:
        component, _, path = layer.key.partition(".")
        assert block_of_layer(f"{component}:{path.replace('.', '_')}") == (layer.block or OUTSIDE), layer.key


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet:input_blocks_4_1_transformer_blocks_0_attn1_to_q", "IN04"),
        ("unet:output_blocks_11_0_out_layers_3", "OUT11"),
        ("unet:middle_block_1_proj_in", "M00"),
        ("unet:time_embed_0", OUTSIDE),
        ("te2:encoder_layers_0_mlp_fc1", "BASE"),
    ],
)
def test_blocks_of_ldm_names(name, block):
    assert block_of_layer(name) == block


def test_block_norms_add_up_as_squares(tmp_path):
    layers = [
        layer for layer in KeyMap.from_modules({"unet": sd1_unet()}) if layer.block == "M00" and "proj" in layer.key
    ]
    tensors = lora_tensors(layers, rank=2, alpha=1.0)
    save_tensors(tmp_path / "a.safetensors", tensors)
    names = {key.rpartition(".lora_up")[0] for key in tensors if ".lora_up" in key}
    squares = (
        torch.linalg.vector_norm(
            0.5
            * tensors[f"{name}.lora_up.weight"].double().flatten(1)
            @ tensors[f"{name}.lora_down.weight"].double().flatten(1)
        ).item()
        ** 2
        for name in names
    )
    norms = inspect_file(tmp_path / "a.safetensors").block_norms()
    assert norms == {"M00": pytest.approx(math.sqrt(sum(squares)), rel=NORM_TOLERANCE)}


def test_a_checkpoint_is_no_lora():
    found = inspect_file(GOLDEN / "base.safetensors")
    assert found.kind == "checkpoint"
    assert (found.layers, found.unused, found.problem) == ((), (), None)


def test_a_file_of_something_else_is_unknown(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"emb_params": torch.ones(2, 768)})
    found = inspect_file(tmp_path / "a.safetensors")
    assert found.kind == "unknown"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_tensor_that_is_not_finite_is_named(bad, dtype):
    tensors = {"good": torch.full((4,), torch.finfo(dtype).max, dtype=dtype), "whole": torch.ones(3, dtype=torch.int64)}
    tensors["bad"] = torch.tensor([1.0, bad, 2.0], dtype=dtype)
    assert list(not_finite(tensors)) == ["bad"]


def test_opposite_infinities_are_not_finite():
    assert list(not_finite({"a": torch.tensor([math.inf, -math.inf])})) == ["a"]


def test_eight_bit_floats_are_looked_at():
    assert list(not_finite({"a": torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn)})) == ["a"]


def test_unused_keys_are_listed(tmp_path):
    layers = lierla(KeyMap.from_modules({"unet": sd1_unet()}))[:1]
    save_tensors(tmp_path / "a.safetensors", lora_tensors(layers) | {"something.else.entirely": torch.ones(1)})
    assert inspect_file(tmp_path / "a.safetensors").unused == ("something.else.entirely",)


def test_what_is_known_of_the_training_is_told(tmp_path):
    layers = lierla(KeyMap.from_modules({"unet": sd1_unet()}))[:1]
    metadata = {"ss_resolution": "512", "ss_tag_frequency": '{"a": {"cat": 2}, "b": {"cat": 1}}'}
    save_tensors(tmp_path / "a.safetensors", lora_tensors(layers), metadata)
    told = inspect_file(tmp_path / "a.safetensors").to_dict()["training"]
    assert told == {"facts": {"resolution": "512"}, "folders": (), "tags": {"cat": 3}}


def test_progress_grows_to_its_end_and_can_end_the_looking(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {f"layer {number}": torch.ones(400_000) for number in range(4)})
    told: list[tuple[int, int]] = []
    inspect_file(tmp_path / "x.safetensors", progress=lambda done, total: told.append((done, total)))
    parts = [done / total for done, total in told]
    assert parts == sorted(parts)
    assert parts[0] == 0
    assert parts[-1] == pytest.approx(1, abs=0.01)
    assert len(set(parts)) >= 8

    def cancel(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect_file(tmp_path / "x.safetensors", progress=cancel)
