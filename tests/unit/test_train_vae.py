"""A training may use another autoencoder than its model's, from a WebUI's file or a folder."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import make_tiny, original_tensors, write_folder

from lib_lora.core.single_file import VAE_PREFIX
from lib_lora.errors import FileError, ModelError
from lib_lora.hosts.standalone.training import load_model
from lib_lora.train.settings import ModelOptions

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models that differ in their weights; and the second one's."""
    folder = tmp_path_factory.mktemp("vae")
    models = [make_tiny("sd1", folder / f"configs{seed}", seed=seed) for seed in (0, 1)]
    return [write_folder(model, folder / f"{index}/model") for index, model in enumerate(models)], models[1].parts


def ldm(parts) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in original_tensors("sd1", parts).items() if name.startswith(VAE_PREFIX)}


@pytest.mark.parametrize("form", ["bare names", "names of a checkpoint", "diffusers' names", "folder", "model"])
def test_an_autoencoder_is_read_in_every_form(folders, tmp_path, form):
    (first, second), parts = folders
    tensors = {
        "bare names": {name.removeprefix(VAE_PREFIX): tensor for name, tensor in ldm(parts).items()},
        "names of a checkpoint": ldm(parts),
        "diffusers' names": parts["vae"].state_dict(),
    }
    path = {"folder": second / "vae", "model": second}.get(form, tmp_path / "vae.safetensors")
    if form in tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors[form].items()}, path)
    loaded = load_model(ModelOptions(str(first), vae=path))
    expected = parts["vae"].state_dict()
    found = loaded.pipe.vae.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(
        not torch.equal(load_model(ModelOptions(str(first))).pipe.vae.state_dict()[name], expected[name])
        for name in expected
    )


def test_what_is_no_autoencoder_is_one_sentence(folders, tmp_path):
    (first, _), _ = folders
    wrong = tmp_path / "lora.safetensors"
    save_file({"a.lora_up.weight": torch.zeros(1, 1)}, wrong)
    with pytest.raises(ModelError, match=r"lora\.safetensors is no autoencoder of SD1, SD2 or SDXL"):
        load_model(ModelOptions(str(first), vae=wrong))
    with pytest.raises(FileError, match=r"missing\.safetensors"):
        load_model(ModelOptions(str(first), vae=tmp_path / "missing.safetensors"))
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        load_model(ModelOptions(str(first), vae=tmp_path / "."))
