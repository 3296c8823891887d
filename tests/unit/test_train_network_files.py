"""Networks in files: what is saved is what was trained, and what is gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lib_lora
from lib_lora.core.files import data_sha256, read_lora_file
from lib_lora.core.network import load_network
from lib_lora.errors import NonFiniteError, TrainError
from lib_lora.session import LoraSession
from lib_lora.tools.convert import convert_lora
from lib_lora.train.create_network import create_network
from lib_lora.train.network_file import network_tensors, save_network
from lib_lora.train.network_options import NetworkOptions
from tests.toys import sd1_inputs, sd1_unet, sdxl_unet, text_encoder, tiny_sd1

DEMO = Path(lib_lora.__file__).parent / "hosts" / "standalone" / "demo"
FUSED_ERROR = 1e-5
FP16_STEP = 2**-10
EFFECT_ERROR = 1e-6


@pytest.fixture(scope="module")
def model():
    return tiny_sd1()


@pytest.fixture(scope="module")
def inputs():
    return sd1_inputs()


def network_of(model, seed: int = 0, **options):
    torch.manual_seed(seed)
    network = create_network(model[0], list(model[1:]), NetworkOptions(**options))
    for layer in network.layers.values():
        nn.init.normal_(layer.lora_up.weight, std=0.1)
    return network


def saved(path, network, dtype=None, **options):
    save_network(path, network_tensors(network, dtype), {"ss_network_dim": "4"}, **options)
    return path


def effects(network) -> dict[str, torch.Tensor]:
    """Layer → scale · up @ down."""
    return {
        name: layer.scale * layer.lora_up.weight.detach().flatten(1) @ layer.lora_down.weight.detach().flatten(1)
        for name, layer in network.layers.items()
    }


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def again(model, path, **options):
    return create_network(model[0], list(model[1:]), NetworkOptions(network_weights=path, **options))


def test_a_saved_network_draws_in_a_session_what_it_drew_in_training(model, inputs, tmp_path):
    network = network_of(model, conv_dim=2, network_alpha=3.0).eval()
    path = saved(tmp_path / "mine.safetensors", network)
    network.attach()
    with torch.no_grad():
        trained = model[0](*inputs).sample
        network.release()
        session = LoraSession({"unet": model[0], "te1": model[1]}, lora_dirs(tmp_path))
        report = session.set("<lora:mine:1>")
        fused = model[0](*inputs).sample
        session.unload()
    assert [(lora.layers, lora.unmatched) for lora in report.applied] == [(len(network.layers), 0)]
    assert (trained - fused).abs().max() < FUSED_ERROR
    assert load_network(path).unused == ()


def lora_dirs(folder):
    from lib_lora.catalog import LoraCatalog

    return LoraCatalog([folder])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_tensors_are_rounded_once_to_the_type_they_are_saved_in(model, tmp_path, dtype):
    network = network_of(model)
    tensors = load_file(saved(tmp_path / "a.safetensors", network, dtype))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert tensors.keys() == network.state_dict().keys()
    assert all(torch.equal(tensors[name], own.to(dtype)) for name, own in network.state_dict().items())


def test_a_file_has_its_own_hashes_and_kohyas_keys(model, tmp_path):
    path = saved(tmp_path / "a.safetensors", network_of(model, network_train_text_encoder_only=True))
    assert read_lora_file(path).metadata["sshs_model_hash"] == data_sha256(path)
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    own = [(key, tuple(tensor.shape)) for key, tensor in load_file(path).items() if key.startswith(f"{name}.")]
    assert sorted(own) == [
        (f"{name}.alpha", ()),
        (f"{name}.lora_down.weight", (4, 32)),
        (f"{name}.lora_up.weight", (32, 4)),
    ]


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (float("inf"), None), (1e5, torch.float16)])
def test_a_network_that_diverged_is_not_saved_over_an_older_file(model, tmp_path, value, dtype):
    network = network_of(model)
    path = saved(tmp_path / "a.safetensors", network)
    before = path.read_bytes()
    layer = next(iter(network.layers.values()))
    nn.init.constant_(layer.lora_up.weight, value)
    with pytest.raises(NonFiniteError, match=r"lora_up\.weight holds NaN or infinity .* nothing was saved"):
        saved(path, network, dtype, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_ranks_alphas_and_weights_can_be_taken_from_a_file_of_any_layout(model, tmp_path, layout):
    first = network_of(model, block_dims=[*range(25)], conv_dim=3, network_alpha=2.5)
    path = saved(tmp_path / "a.safetensors", first)
    if layout == "peft":
        convert_lora(path, "peft", tmp_path / "b.safetensors", family=first.family)
        path = tmp_path / "b.safetensors"
    network = again(model, path, dim_from_weights=True)
    own, theirs = network.layers, first.layers
    assert {name: (layer.rank, layer.alpha.item()) for name, layer in own.items()} == {
        name: (layer.rank, layer.alpha.item()) for name, layer in theirs.items()
    }
    found = network.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in first.state_dict().items())
    assert network.notes == ()


def test_another_alpha_keeps_the_effect_of_the_file(model, tmp_path):
    first = network_of(model, network_alpha=4.0)
    network = again(model, saved(tmp_path / "a.safetensors", first), network_alpha=1.0)
    assert {layer.alpha.item() for layer in network.layers.values()} == {1.0}
    assert largest_difference(effects(network), effects(first)) < EFFECT_ERROR


def test_what_is_not_trained_or_not_in_the_file_is_told(model, tmp_path):
    path = saved(tmp_path / "a.safetensors", network_of(model, conv_dim=4))
    network = again(model, path, network_train_unet_only=True)
    (note,) = network.notes
    assert note == f"{278 - 192 + 18} layers of a.safetensors are not trained here and left out"
    path = saved(tmp_path / "b.safetensors", network_of(model))
    network = again(model, path, conv_dim=4)
    assert network.notes == (f"{278 - 192} of 296 layers are not in b.safetensors and begin anew",)


def test_sdxls_files_are_gone_on_from(tmp_path):
    parts = (sdxl_unet(), text_encoder(layers=1), text_encoder(layers=1))
    first = network_of(parts, conv_dim=2)
    network = again(parts, saved(tmp_path / "a.safetensors", first), dim_from_weights=True)
    assert network.family is first.family
    assert {name.partition("_text_")[0] for name in network.layers if "_te" in name} == {"lora_te1", "lora_te2"}
    assert largest_difference(effects(network), effects(first)) == 0


def test_another_rank_is_refused(model, tmp_path):
    path = saved(tmp_path / "a.safetensors", network_of(model))
    with pytest.raises(TrainError, match="has rank 4, the options say 8; change them, or take ranks from the file"):
        again(model, path, network_dim=8)


def test_a_file_for_another_model_is_refused(model, tmp_path):
    wide = (sd1_unet(block_out_channels=(8, 16, 32, 32)), model[1])
    path = saved(tmp_path / "a.safetensors", network_of(wide))
    with pytest.raises(TrainError, match=r"is not for this model: it has no layer unet:.* of shape \(32, 32"):
        again(model, path, dim_from_weights=True)


def test_a_file_without_a_layer_that_is_trained_is_refused(model, tmp_path):
    text = saved(tmp_path / "text.safetensors", network_of(model, network_train_text_encoder_only=True))
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    for path in (text, tmp_path / "model.safetensors"):
        with pytest.raises(TrainError, match=f"{path.name} has no layer of those that are trained"):
            network_of(model, network_weights=path, network_train_unet_only=True)


def test_other_algorithms_are_refused(model, tmp_path):
    name, shapes = "lora_unet_mid_block_attentions_0_proj_in", {"a": (24, 2), "b": (2, 24)}
    factors = {f"{name}.hada_w{one}_{part}": torch.ones(shapes[part]) for one in "12" for part in "ab"}
    save_file(factors, tmp_path / "a.safetensors")
    with pytest.raises(TrainError, match="is LoHa; only plain LoRA layers can be trained on"):
        again(model, tmp_path / "a.safetensors", dim_from_weights=True)


def test_a_layer_under_two_names_is_refused(model, tmp_path):
    tensors = network_tensors(network_of(model))
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    other = {key.replace(layer, "lora_unet_middle_block_1_proj_in"): tensors[key] for key in tensors if layer in key}
    save_network(tmp_path / "a.safetensors", tensors | other, {})
    with pytest.raises(TrainError, match=f"holds {layer} under two names"):
        again(model, tmp_path / "a.safetensors", dim_from_weights=True)


@pytest.mark.parametrize("name", ["stripes", "outline"])
def test_the_embedded_models_loras_are_gone_on_from(name):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    parts = [
        UNet2DConditionModel.from_pretrained(DEMO / "model", subfolder="unet"),
        CLIPTextModel.from_pretrained(DEMO / "model", subfolder="text_encoder"),
    ]
    file = DEMO / "loras" / f"{name}.safetensors"
    network = again(parts, file, dim_from_weights=True)
    assert network.notes == ()
    assert network.state_dict().keys() == load_file(file).keys()


def test_a_dylora_is_made_of_one_rank_that_units_divide(model, tmp_path):
    path = saved(tmp_path / "a.safetensors", network_of(model, network_dim=6, conv_dim=6))
    network = again(model, path, dim_from_weights=True, network_module="dylora", unit=3)
    assert {layer.units.rank for layer in network.layers.values()} == {6}
    with pytest.raises(TrainError, match="has the ranks 6; DyLoRA needs one, a multiple of unit 4"):
        again(model, path, dim_from_weights=True, network_module="dylora", unit=4)
    mixed = saved(tmp_path / "b.safetensors", network_of(model, network_dim=6, conv_dim=2))
    with pytest.raises(TrainError, match="has the ranks 2, 6; DyLoRA needs one"):
        again(model, mixed, dim_from_weights=True, network_module="dylora")
