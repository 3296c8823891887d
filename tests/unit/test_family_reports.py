"""What is told of a LoRA of any family: its algorithm, ranks, base model and why, what is missing, where it acts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from toys import kohya_name, lierla, lora_tensors, sd1_unet, sdxl_unet, text_encoder

from lib_lora import LoraSession
from lib_lora.__main__ import main
from lib_lora.catalog import LoraCatalog
from lib_lora.core.keymap import KeyMap
from lib_lora.core.models import BaseModel, guess_of_file
from lib_lora.core.network import load_network
from lib_lora.core.norms import shares
from lib_lora.core.saving import save_tensors
from lib_lora.errors import UnknownLoraError
from lib_lora.tools.inspect import inspect_file

NORM_TOLERANCE = 1e-5
RANK = 2


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))) * 0.3


def layer_roles(family: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors of one layer whose ΔW can be computed from the file, or not."""
    out, columns = shape[0], math.prod(shape[1:])
    return {
        "LoHa": {
            f"hada_w{i}_{side}": random(*size)
            for i in (1, 2)
            for side, size in (("a", (out, RANK)), ("b", (RANK, columns)))
        },
        "LoKr": {"lokr_w1": random(2, 2), "lokr_w2": random(out // 2, columns // 2)},
        "Full": {"diff": random(*shape), "diff_b": random(out)},
        "IA3": {"weight": random(out), "on_input": torch.tensor(0.0)},
        "OFT": {"oft_blocks": random(2, out // 2, out // 2)},
    }[family]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return {"unet": sd1_unet(), "te1": text_encoder()}


@pytest.fixture(scope="module")
def linear(model):
    """Two layers of one block each."""
    layers = [layer for layer in KeyMap.from_modules(model) if layer.key.endswith("attn1.to_out.0")]
    return layers[0], layers[-1]


def write(path, layers, family: str):
    tensors = {
        f"{kohya_name(layer)}.{role}": tensor
        for layer in layers
        for role, tensor in layer_roles(family, layer.shape).items()
    }
    save_tensors(path, tensors, {}, overwrite=True)
    return path


@pytest.mark.parametrize("family", ["LoHa", "LoKr", "Full"])
def test_the_norm_of_each_layer_is_that_of_its_change(family, linear, tmp_path):
    found = inspect_file(write(tmp_path / "a.safetensors", linear, family))
    network = load_network(tmp_path / "a.safetensors")
    assert len(found.layers) == len(network.adapters)
    for facts in found.layers:
        adapter = network.adapters[facts.name]
        exact = adapter.delta_weight(torch.zeros(adapter.shape)).norm().item()
        assert facts.norm == pytest.approx(exact, rel=NORM_TOLERANCE)
        assert facts.algorithm == family


@pytest.mark.parametrize("family", ["IA3", "OFT"])
def test_what_depends_on_the_weights_has_a_norm_only_on_a_model(family, model, linear, tmp_path):
    path = write(tmp_path / "a.safetensors", linear, family)
    assert [facts.norm for facts in inspect_file(path).layers] == [None, None]
    session = LoraSession(model, LoraCatalog([tmp_path]))
    report = session.set([("a", 1.0)])
    assert report.applied[0].algorithms == {family: 2}
    parts = session.block_shares("a")
    session.clear()
    network = load_network(path)
    norms = {}
    for name, adapter in network.adapters.items():
        layer = session.keymap.find(name)
        norms[layer.block] = adapter.delta_weight(layer.live())
    whole = sum(norm.square().sum().item() for norm in norms.values())
    assert parts == pytest.approx({block: norm.square().sum().item() / whole for block, norm in norms.items()})
    session.unload()


def test_shares_add_up_to_one_and_layers_without_a_norm_are_left_out():
    found = shares([("IN01", 3.0), ("M00", 4.0), ("M00", None)])
    assert found == {"IN01": pytest.approx(0.36), "M00": pytest.approx(0.64)}
    assert shares([]) == {}


def test_the_shares_of_a_lora_that_is_not_active_can_not_be_asked_for(model, tmp_path):
    with pytest.raises(UnknownLoraError, match="'nobody' is not active"):
        LoraSession(model, LoraCatalog([tmp_path])).block_shares("nobody")


def test_a_report_names_algorithms_ranks_and_what_the_model_lacks_by_component(model, linear, tmp_path):
    tensors = lora_tensors(linear, rank=4) | lora_tensors(lierla(KeyMap.from_modules(model))[:3], rank=2)
    loha = layer_roles("LoHa", (8, 8))
    tensors |= {f"lora_unet_nowhere_{number}.{role}": t for number in range(5) for role, t in loha.items()}
    tensors |= {f"lora_te2_nowhere.{role}": t for role, t in loha.items()}
    save_tensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    (lora,) = LoraSession(model, LoraCatalog([tmp_path])).set([("a", 1.0)]).applied or [None]
    assert lora is not None
    assert set(lora.algorithms) == {"LoRA", "LoHa"}
    assert lora.ranks == (2, 4)
    assert lora.missing["unet"] == (5, ("nowhere_0", "nowhere_1", "nowhere_2"))
    assert lora.missing["te2"] == (1, ("nowhere",))
    assert lora.unmatched == 6


@pytest.mark.parametrize(
    ("shapes", "metadata", "family", "evidence"),
    [
        ({"unet:add_embedding_linear_1": ()}, {}, BaseModel.SDXL, "names of its layers"),
        ({"unet:x_attn2_to_k": (320, 768)}, {}, BaseModel.SD1, "widths of its layers"),
        ({"unet:x": ()}, {"ss_v2": "True"}, BaseModel.SD2, "its metadata"),
        ({"te2:x": ()}, {}, BaseModel.SDXL, "its second text encoder"),
        ({"te1:x_self_attn_q_proj": (768, 768)}, {}, BaseModel.SD1, "its text encoder alone"),
        ({"unet:x": ()}, {}, BaseModel.UNKNOWN, ""),
    ],
)
def test_the_reason_for_a_guessed_base_model_is_told(shapes, metadata, family, evidence):
    assert guess_of_file(shapes, metadata) == (family, evidence)


def test_embeddings_that_come_with_a_lora_are_kept_and_named(model, linear, tmp_path):
    vectors = random(2, 32)
    tensors = lora_tensors(linear) | {"bundle_emb.my style.string_to_param.*": vectors}
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert inspect_file(tmp_path / "a.safetensors").embeddings == ("my style",)
    network = load_network(tmp_path / "a.safetensors")
    assert torch.equal(network.embeddings["my style"]["string_to_param.*"], vectors)
    assert not network.unused
    (lora,) = LoraSession(model, LoraCatalog([tmp_path])).set([("a", 1.0)]).applied
    assert lora.embeddings == ("my style",)


def checkpoint(path, unet):
    """A diffusers folder with a UNet in it."""
    save_tensors(path / "unet" / "diffusion_pytorch_model.safetensors", dict(unet.state_dict()))
    return path


def test_a_file_is_laid_over_a_model_on_disk(model, linear, tmp_path, capsys):
    (tmp_path / "model/unet").mkdir(parents=True)
    folder = checkpoint(tmp_path / "model", model["unet"])
    tensors = {
        f"{kohya_name(layer)}.{role}": tensor
        for layer in linear
        for role, tensor in layer_roles("OFT", layer.shape).items()
    }
    tensors |= {f"lora_unet_nowhere.{role}": t for role, t in layer_roles("LoHa", (8, 8)).items()}
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--model", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fit"]["matched"] == 2
    assert found["fit"]["total"] == 3
    assert found["fit"]["missing"] == {"unet": [1, ["nowhere"]]}
    assert sum(found["block_shares"].values()) == pytest.approx(1)
    assert all(layer["norm"] is not None for layer in found["layers"])
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--model", str(folder)]) == 0
    assert "2 of 3 layers exist in this" in capsys.readouterr().out


def test_a_file_for_another_model_is_told_so(linear, tmp_path):
    (tmp_path / "model/unet").mkdir(parents=True)
    folder = checkpoint(tmp_path / "model", sdxl_unet())
    write(tmp_path / "a.safetensors", linear, "LoHa")
    fit = inspect_file(tmp_path / "a.safetensors", folder).fit
    assert fit is not None
    assert fit.problem


def test_a_folder_without_weights_is_no_model(tmp_path, linear, capsys):
    write(tmp_path / "a.safetensors", linear, "LoHa")
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--model", str(tmp_path)]) == 1
    assert "is no .safetensors checkpoint and no diffusers folder" in capsys.readouterr().err
