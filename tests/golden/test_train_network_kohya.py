"""Networks in training beside what kohya's scripts made of the same options, files and steps."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from lib_lora.core.models import BaseModel
from lib_lora.errors import JobError
from lib_lora.train.block_lr import layout_of
from lib_lora.train.create_network import create_network
from lib_lora.train.network_layers import TrainedModel
from lib_lora.train.network_options import NetworkOptions
from tests.fullsize import FAMILIES, diffusers_model, facts, kohya_shapes
from tests.golden.kohya_model import HERE, build

FORMULA_ERROR = 1e-12
NORM_ERROR = 1e-6
STEP_ERROR = 1e-5  # of a loss in float32
FORWARD_ERROR = 1e-5

DIMS = json.loads((HERE / "create_network_dims.json").read_text(encoding="utf-8"))
MADE = {name: case for name, case in DIMS.items() if "error" not in case["modules"]}
GROUPS = json.loads((HERE / "optimizer_groups.json").read_text(encoding="utf-8"))
MAX_NORM = json.loads((HERE / "max_norm.json").read_text(encoding="utf-8"))
RATES = facts("block_lr_weight")
REFUSED = {"unknownname": "names no curve 'unknownname'", "0.5": r"one number for many blocks, 0.5; write zeros\+0.5"}
"""Where kohya's script ends with a TypeError; a list that is too long on one side is one such case too."""


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def vectors():
    return load_file(HERE / "forward.safetensors")


def options(kwargs: dict, **more) -> NetworkOptions:
    """As kohya's ``create_network`` takes them; None stands for its default."""
    known = {"dim": "network_dim", "alpha": "network_alpha"}
    own = {known[name]: value for name, value in kwargs.items() if name in known and value is not None}
    arguments = [f"{name}={value}" for name, value in kwargs.items() if name not in known]
    return NetworkOptions(network_args=arguments, **own, **more)


def from_file(model, name: str, **more):
    unet, te = model
    file = HERE / f"{name}.safetensors"
    return create_network(unet, [te], NetworkOptions(network_weights=file, dim_from_weights=True, **more))


@pytest.mark.parametrize("case", MADE)
def test_layers_ranks_and_alphas_are_kohyas(model, case):
    unet, te = model
    network = create_network(unet, [te], options(MADE[case]["kwargs"]))
    assert {name: [layer.rank, layer.alpha.item()] for name, layer in network.layers.items()} == MADE[case]["modules"]
    assert all(layer.scale == layer.alpha.item() / layer.rank for layer in network.layers.values())


def test_a_list_of_another_length_is_refused_where_kohya_asserts(model):
    assert [case for case in DIMS if case not in MADE] == ["block_dims_wrong_len"]
    with pytest.raises(JobError, match="block_dims holds 3 numbers, this model has 25 blocks"):
        create_network(model[0], [model[1]], options(DIMS["block_dims_wrong_len"]["kwargs"]))


@pytest.mark.parametrize("case", RATES, ids=lambda case: f"{case['sdxl']}-{case['kwargs']}")
def test_factors_of_learning_rates_are_kohyas(case):
    layout = layout_of(BaseModel.SDXL if case["sdxl"] else BaseModel.SD1)
    down = case["kwargs"].get("down_lr_weight", "")
    if down in REFUSED:
        with pytest.raises(JobError, match=REFUSED[down]):
            options(case["kwargs"])
        return
    weights = options(case["kwargs"]).lr_weights(layout)
    if case["result"] is None:
        assert weights is None
    elif isinstance(case["result"], list):
        assert weights.blocks == pytest.approx(case["result"], abs=FORMULA_ERROR)
    else:  # too long on one side: kohya fails, here the rest is not used
        count = layout.down
        assert weights.blocks[layout.ends : layout.ends + count] == (0.7,) * count
        assert "down_lr_weight holds 14 numbers" in weights.notes[0]


def test_every_recorded_fault_is_looked_at():
    faults = [case["kwargs"] for case in RATES if isinstance(case["result"], dict)]
    assert len(faults) == 6
    assert {kwargs["down_lr_weight"] for kwargs in faults} == {*REFUSED, ",".join(["0.7"] * 14)}


def test_blocks_of_sd1s_layers_are_kohyas(model):
    targets = TrainedModel(model[0], [model[1]], ("te1", "unet")).targets(wide=True)
    assert {target.name: target.block for target in targets} == facts("block_index")["sd1_get_block_index"]


def test_blocks_of_sdxls_layers_are_kohyas():
    layout = layout_of(BaseModel.SDXL)
    for name, index in facts("block_index")["sdxl_get_block_index"].items():
        path = re.sub(r"_(?=\d)|(?<=\d)_", ".", name.removeprefix("lora_unet_"))
        assert layout.index(path) == index, name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_of_every_layer_are_kohyas(family):
    components = diffusers_model(family)
    encoders = [module for name, module in components.items() if name != "unet"]
    model = TrainedModel(components["unet"], encoders, tuple(components))
    assert {target.name for target in model.targets(wide=False)} == {*facts(f"{family}_lora_names")["lierla"]}
    shapes = {target.name: list(target.shape) for target in model.targets(wide=True)}
    assert shapes == kohya_shapes(family)


@pytest.mark.parametrize("case", GROUPS, ids=lambda case: f"{case['args']}-{case['kwargs']}")
def test_parameter_groups_are_kohyas(model, case):
    text_encoder_lr, unet_lr, default_lr = case["args"]
    network = create_network(model[0], [model[1]], options(case["kwargs"]))
    groups = network.groups(unet_lr, text_encoder_lr, default_lr)
    assert [
        (group["name"], pytest.approx(group["lr"], rel=FORMULA_ERROR), len(group["params"]), numel(group))
        for group in groups
    ] == [(theirs["desc"], theirs["lr"], theirs["n_params"], theirs["numel"]) for theirs in case["groups"]]


def numel(group) -> int:
    return sum(parameter.numel() for parameter in group["params"])


def test_long_changes_are_shortened_as_kohya_does(model):
    network = from_file(model, MAX_NORM["lora"].removesuffix(".safetensors"))
    before = {name: parameter.detach().norm() for name, parameter in network.named_parameters()}
    norms = network.scale_weight_norms(MAX_NORM["max_norm_value"])
    ratios = {name: (parameter.norm() / before[name]).item() for name, parameter in network.named_parameters()}
    assert norms.scaled == MAX_NORM["keys_scaled"]
    assert norms.mean == pytest.approx(MAX_NORM["mean_norm"], abs=NORM_ERROR)
    assert norms.largest == pytest.approx(MAX_NORM["max_norm"], abs=NORM_ERROR)
    assert ratios == pytest.approx(MAX_NORM["norm_ratio_after_before"], abs=NORM_ERROR)


ATTACHED = {"A0.7": ("lora_A", 0.7), "D0.7": ("lora_D_c3lier", 0.7), "E-0.4": ("lora_E_c3lier", -0.4)}


@pytest.mark.parametrize("tag", ATTACHED)
def test_an_attached_network_computes_what_kohyas_does(model, vectors, tag):
    unet, te = model
    file, strength = ATTACHED[tag]
    network = from_file(model, file)
    network.set_multiplier(strength)
    network.attach()
    with torch.no_grad():
        noise = unet(vectors["x"], vectors["timesteps"], vectors["context"]).sample
        text = te(vectors["input_ids"]).last_hidden_state
    network.release()
    assert (noise - vectors[f"unet_{tag}"]).abs().max() < FORWARD_ERROR
    assert (text - vectors[f"te_last_{tag}"]).abs().max() < FORWARD_ERROR


def test_three_steps_have_kohyas_losses(model, vectors):
    unet, te = model
    network = from_file(model, "lora_D_c3lier").train()
    network.attach()
    optimizer = torch.optim.SGD(network.groups(1.0, 0.5, None))
    losses = []
    for _ in range(3):
        context = te(vectors["input_ids"])[0]
        noise = unet(vectors["x"], vectors["timesteps"], context).sample
        loss = torch.nn.functional.mse_loss(noise, vectors["sgd_target"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    network.release()
    assert losses == pytest.approx(vectors["sgd_losses"].tolist(), abs=STEP_ERROR)
    assert losses[2] < losses[0] - STEP_ERROR
