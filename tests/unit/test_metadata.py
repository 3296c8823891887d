"""What tools write into headers: kohya's hashes and facts, and ModelSpec."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lib_lora.core.files import read_lora_file
from lib_lora.core.models import BaseModel
from lib_lora.core.saving import save_tensors
from lib_lora.tools.metadata import lora_metadata, model_spec, one_or_dynamic, sshs_hashes, usual_prediction

GOLDEN = Path(__file__).parents[1] / "golden" / "sd1"
NOON = datetime(2026, 1, 2, 12, 0, 0, 345)
KOHYA_FILES = ["lora_A", "lora_B", "lora_D_c3lier", "lora_E_c3lier"]
LAYER = "lora_unet_mid_block_attentions_0_proj_in"
CONV = "lora_unet_mid_block_resnets_0_conv1"


def lora(rank: int = 4, alpha: float = 2.0, conv_rank: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{LAYER}.lora_down.weight": torch.randn(rank, 8, generator=generator),
        f"{LAYER}.lora_up.weight": torch.randn(8, rank, generator=generator),
        f"{LAYER}.alpha": torch.tensor(alpha),
    }
    if conv_rank:
        tensors[f"{CONV}.lora_down.weight"] = torch.randn(conv_rank, 8, 3, 3, generator=generator)
        tensors[f"{CONV}.lora_up.weight"] = torch.randn(8, conv_rank, 1, 1, generator=generator)
    return tensors


@pytest.mark.parametrize("name", KOHYA_FILES)
def test_hashes_and_facts_are_those_that_kohya_wrote_into_its_files(name):
    file = read_lora_file(GOLDEN / f"{name}.safetensors")
    made = lora_metadata(file.tensors, {}, family=BaseModel.SD1, title=name, now=NOON)
    for key in ("sshs_model_hash", "sshs_legacy_hash", "ss_network_dim", "ss_network_alpha", "ss_network_module"):
        assert made[key] == file.metadata[key], key
    assert (made["ss_v2"], made["ss_base_model_version"]) == ("False", "sd_v1")
    theirs = json.loads(file.metadata.get("ss_network_args", "{}"))
    ours = json.loads(made.get("ss_network_args", "{}"))
    assert {key: float(value) for key, value in ours.items()} == {key: float(value) for key, value in theirs.items()}


def kohyas_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """As sd-scripts computes them from the whole serialisation."""
    data = safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = int.from_bytes(data[:8], "little") + 8
    legacy = hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    return hashlib.sha256(data[start:]).hexdigest(), legacy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 300_000, 700_000])
def test_hashes_of_large_files_are_those_of_the_whole_serialisation(dtype, columns):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(columns, generator=generator).to(dtype) for i in range(3)}
    tensors["alpha"] = torch.tensor(3.0)
    metadata = {"ss_comment": 'ä "quoted"\n\t\x01 日本', "modelspec.title": "not part of it"}
    made = sshs_hashes(tensors, metadata)
    assert (made["sshs_model_hash"], made["sshs_legacy_hash"]) == kohyas_hashes(tensors, metadata)
    assert (made["sshs_legacy_hash"] == "e3b0c442") == (columns == 1)


def test_the_hash_is_that_of_the_file_that_is_saved_from_any_strides(tmp_path):
    tensors = {"a": torch.randn(6, 4).T, "b": torch.randn(10)[::2].half()}
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors)
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert sshs_hashes(tensors, {})["sshs_model_hash"] == hashlib.sha256(data).hexdigest()


def test_ranks_and_alphas_that_differ_are_dynamic_and_convolutions_are_told_apart():
    tensors = lora(4, 2.0, conv_rank=3)
    made = lora_metadata(tensors, {"ss_network_args": '{"dropout": "0.1", "conv_dim": "9"}'}, **sd1())
    assert (made["ss_network_dim"], made["ss_network_alpha"]) == ("4", "2.0")
    assert json.loads(made["ss_network_args"]) == {"dropout": "0.1", "conv_dim": "3", "conv_alpha": "3.0"}
    more = {name.replace("proj_in", "proj_out"): tensor for name, tensor in lora(5).items()}
    made = lora_metadata(tensors | more, {}, **sd1())
    assert (made["ss_network_dim"], made["ss_network_alpha"]) == ("Dynamic", "2.0")
    assert one_or_dynamic([]) == "Dynamic"


def sd1() -> dict:
    return {"family": BaseModel.SD1, "title": "t", "now": NOON}


def test_what_the_source_says_is_kept_but_for_what_its_tensors_were():
    base = {"ss_tag_frequency": "{}", "sshs_model_hash": "0" * 64, "modelspec.hash_sha256": "1", "author": "me"}
    base |= {"modelspec.title": "old", "ss_network_args": "broken {", "modelspec.license": "CC0"}
    made = lora_metadata(lora(), base, **sd1())
    assert (made["ss_tag_frequency"], made["author"], made["modelspec.license"]) == ("{}", "me", "CC0")
    assert (made["modelspec.title"], made["ss_network_args"]) == ("t", "{}")
    assert "modelspec.hash_sha256" not in made
    assert made["sshs_model_hash"] == sshs_hashes(lora(), made)["sshs_model_hash"] != "0" * 64


@pytest.mark.parametrize(
    ("family", "prediction", "is_lora", "expected"),
    [
        (BaseModel.SD1, None, True, ("stable-diffusion-v1/lora", "diffusers", "512x512", "epsilon")),
        (BaseModel.SD2, None, True, ("stable-diffusion-v2-768-v/lora", "diffusers", "768x768", "v")),
        (BaseModel.SD2, "epsilon", True, ("stable-diffusion-v2-512/lora", "diffusers", "512x512", "epsilon")),
        (BaseModel.SDXL, None, True, ("stable-diffusion-xl-v1-base/lora", "SGM", "1024x1024", "epsilon")),
        (BaseModel.SD1, None, False, ("stable-diffusion-v1", "SGM", "512x512", "epsilon")),
        (BaseModel.SDXL, "v", False, ("stable-diffusion-xl-v1-base", "SGM", "1024x1024", "v")),
    ],
)
def test_model_spec_names_the_architecture_as_kohya_does(family, prediction, is_lora, expected):
    made = model_spec(family, title="x", is_lora=is_lora, prediction=prediction, merged_from=("a", "b"), now=NOON)
    keys = ("architecture", "implementation", "resolution", "prediction_type")
    sgm = "https://github.com/Stability-AI/generative-models"
    assert tuple(made[f"modelspec.{key}"].replace(sgm, "SGM") for key in keys) == expected
    assert (made["modelspec.date"], made["modelspec.merged_from"]) == ("2026-01-02T12:00:00", "a, b")
    assert made["modelspec.sai_model_spec"] == "1.0.1"


def test_of_other_families_only_what_is_known_is_told():
    made = lora_metadata(lora(), {}, family=BaseModel.FLUX, title="x", now=NOON)
    assert not made.keys() & {"modelspec.architecture", "ss_v2", "ss_base_model_version", "modelspec.prediction_type"}
    assert made["modelspec.title"] == "x"


@pytest.mark.parametrize(
    ("family", "metadata", "expected"),
    [
        (BaseModel.SD2, {"ss_base_model_version": "sd_v2"}, "epsilon"),
        (BaseModel.SD2, {"ss_base_model_version": "sd_v2_v"}, "v"),
        (BaseModel.SDXL, {"modelspec.prediction_type": "v_prediction"}, "v"),
        (BaseModel.SD1, {"modelspec.prediction_type": "nonsense"}, "epsilon"),
    ],
)
def test_the_source_tells_what_the_model_predicts(family, metadata, expected):
    assert usual_prediction(family, metadata) == expected
