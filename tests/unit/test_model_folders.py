"""Models from diffusers' folders, and from paths that are none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_pipelines import make_tiny, write_folder

from lib_lora.errors import ModelError
from lib_lora.hosts.standalone.loading import load_pipeline

pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

SAME_WEIGHTS_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("sd1", tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return write_folder(model, tmp_path_factory.mktemp("saved") / "my-model")


def test_a_diffusers_folder_loads_with_its_name_and_its_files(model, folder):
    loaded = load_pipeline(folder, "cpu")
    for ours, theirs in zip(loaded.pipe.unet.parameters(), model.parts["unet"].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=SAME_WEIGHTS_TOLERANCE, rtol=0)
    assert loaded.name == "my-model"
    assert [file.parent.name for file in loaded.files] == ["unet", "text_encoder"]
    assert loaded.size == 64


def test_a_folder_with_half_precision_files_only_is_found(folder, tmp_path):
    half = shutil.copytree(folder, tmp_path / "half")
    for file in half.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert all(".fp16." in file.name for file in load_pipeline(half, "cpu").files)


def test_a_folder_with_pickles_only_is_refused(folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    for file in old.glob("unet/*.safetensors"):
        torch.save({}, file.with_suffix(".bin"))
        file.unlink()
    with pytest.raises(ModelError, match="can not be loaded"):
        load_pipeline(old, "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"unet": ["my_code", "Unet"]}, "unet with code of its own"),
        ({"_class_name": ["StableDiffusionPipeline"]}, "can not be read"),
    ],
)
def test_a_folder_that_asks_for_other_code_is_refused(folder, tmp_path, change, said):
    other = shutil.copytree(folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ModelError, match=said):
        load_pipeline(other, "cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_index_is_refused(folder, tmp_path, text):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "model_index.json").write_text(text)
    with pytest.raises(ModelError):
        load_pipeline(other, "cpu")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load_pipeline(tmp_path, "cpu")


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ModelError, match="There is no model"):
        load_pipeline(tmp_path / "nothing", "cpu")


def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(ModelError, match="device"):
        load_pipeline(folder, "cuda:99")


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(ModelError, match="fp8"):
        load_pipeline(folder, "cpu", "fp8")
