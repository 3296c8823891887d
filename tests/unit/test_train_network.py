"""A network in training on a small Stable Diffusion 1: beside PEFT, under checkpointing and autocast, on and off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lib_lora.train.create_network import create_network
from lib_lora.train.network_options import NetworkOptions
from tests.toys import digest, sdxl_unet, text_encoder, tiny_sd1

STEP_ERROR = 1e-5  # of a weight, float32, after three steps
CHECKPOINT_ERROR = 1e-6
STRENGTH_ERROR = 1e-5
BF16_ERROR = 0.05  # of the noise's norm
RANK, ALPHA = 4, 2.0
LIMIT = 0.2
DROPOUTS = {"network_dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}


@pytest.fixture(scope="module")
def model():
    return tiny_sd1()


@pytest.fixture(scope="module")
def batch():
    draw = torch.Generator().manual_seed(1)
    return {
        "noisy": torch.randn(3, 4, 8, 8, generator=draw),
        "times": torch.tensor([5, 400, 900]),
        "tokens": torch.randint(3, 260, (3, 9), generator=draw),
        "noise": torch.randn(3, 4, 8, 8, generator=draw),
    }


def predict(model, batch) -> torch.Tensor:
    unet, encoder = model
    return unet(batch["noisy"], batch["times"], encoder(batch["tokens"]).last_hidden_state).sample


def loss_of(model, batch) -> torch.Tensor:
    return nn.functional.mse_loss(predict(model, batch).float(), batch["noise"])


def attached(model, seed: int = 2, std: float = 0.1, **options):
    """A network with random up factors, so that all gradients are there at once."""
    torch.manual_seed(seed)
    network = create_network(model[0], [model[1]], NetworkOptions(**options))
    for layer in network.layers.values():
        nn.init.normal_(layer.lora_up.weight, std=std)
    network.attach()
    return network


def gradients(network) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None
    }


def with_peft(model, network) -> tuple[list[nn.Module], dict[str, nn.Parameter]]:
    """A copy of the model with PEFT's adapters that have the network's weights, and these by the network's names."""
    from peft import LoraConfig, inject_adapter_in_model

    theirs, weights = [], {}
    for own in model:
        paths = {id(module): path for path, module in own.named_modules()}
        names = {paths[id(base)]: name for name, base in network.bases.items() if id(base) in paths}
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[*names])
        theirs.append(inject_adapter_in_model(config, copy.deepcopy(own)))
        for path, name in names.items():
            adapter = theirs[-1].get_submodule(path)
            weights[f"{name}.lora_down.weight"] = adapter.lora_A["default"].weight
            weights[f"{name}.lora_up.weight"] = adapter.lora_B["default"].weight
    for name, parameter in network.named_parameters():
        weights[name].data.copy_(parameter)
    return theirs, weights


def three_steps(model, batch, parameters) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


@pytest.mark.newest
def test_three_steps_are_those_of_peft(model, batch):
    network = attached(model, network_dim=RANK, network_alpha=ALPHA, conv_dim=RANK, conv_alpha=ALPHA)
    network.release()
    theirs, weights = with_peft(model, network)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    network.attach()
    three_steps(model, batch, network.parameters())
    network.release()
    three_steps(theirs, batch, weights.values())
    own = dict(network.named_parameters())
    assert weights.keys() == own.keys()
    assert max((own[name] - weights[name]).abs().max() for name in own) < STEP_ERROR
    assert max((own[name] - before[name]).abs().max() for name in own) > 100 * STEP_ERROR


def switch(model, checkpointing: bool) -> None:
    unet, encoder = model
    if checkpointing:
        unet.enable_gradient_checkpointing()
        encoder.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        unet.disable_gradient_checkpointing()
        encoder.gradient_checkpointing_disable()
    for part in model:
        part.train(checkpointing)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("module", ["lora", "dylora"])
@pytest.mark.parametrize("dropouts", [{}, DROPOUTS], ids=["whole", "dropouts"])
def test_gradients_under_checkpointing_are_those_without(model, batch, module, dropouts):
    network = attached(model, network_module=module, conv_dim=4, **dropouts).train()
    found = []
    for checkpointing in (False, True):
        switch(model, checkpointing)
        torch.manual_seed(7)
        network.zero_grad()
        loss_of(model, batch).backward()
        found.append(gradients(network))
    switch(model, False)
    network.release()
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > (100 if dropouts else 500)
    assert max((found[0][name] - found[1][name]).abs().max() for name in found[0]) < CHECKPOINT_ERROR


def hooks(model) -> list[list]:
    return [
        [*one._forward_hooks.values(), *one._forward_pre_hooks.values()] for part in model for one in part.modules()
    ]


def test_a_released_model_is_as_it_was(model, batch):
    before = digest(*model), predict(model, batch), hooks(model)
    network = attached(model, conv_dim=2, network_module="dylora", network_dim=2).eval()
    changed = predict(model, batch)
    network.attach()
    assert torch.equal(predict(model, batch), changed)  # twice is once
    network.release()
    network.release()
    assert (changed - before[1]).abs().max() > 100 * STEP_ERROR
    assert digest(*model) == before[0]
    assert torch.equal(predict(model, batch), before[1])
    assert hooks(model) == before[2]


def test_a_new_network_changes_nothing_and_learns(model, batch):
    before = predict(model, batch)
    torch.manual_seed(0)
    network = create_network(model[0], [model[1]], NetworkOptions())
    network.attach()
    assert torch.equal(predict(model, batch), before)
    loss_of(model, batch).backward()
    network.release()
    assert any(gradient.abs().max() > 0 for gradient in gradients(network).values())
    assert all(parameter.grad is None for part in model for parameter in part.parameters())


def test_strength_0_is_the_model_bit_for_bit(model, batch):
    before = predict(model, batch)
    network = attached(model)
    network.set_multiplier(0)
    assert torch.equal(predict(model, batch), before)
    network.release()


def test_each_picture_has_its_own_strength(model, batch):
    strengths = [0.0, 0.5, -1.25]
    network = attached(model, conv_dim=2)
    network.set_multiplier(torch.tensor(strengths))
    together = predict(model, batch)
    for index, strength in enumerate(strengths):
        network.set_multiplier(strength)
        assert (predict(model, batch)[index] - together[index]).abs().max() < STRENGTH_ERROR
    network.release()
    assert (together[0] - predict(model, batch)[0]).abs().max() < STRENGTH_ERROR


def test_changes_that_are_longer_are_shortened_and_others_stay(model):
    network = create_network(model[0], [model[1]], NetworkOptions(network_dim=RANK, network_alpha=ALPHA, conv_dim=2))
    for index, layer in enumerate(network.layers.values()):
        nn.init.normal_(layer.lora_up.weight, std=(0, 0.01, 1)[index % 3])

    def lengths() -> torch.Tensor:
        layers = network.layers.values()
        factors = [(one.lora_up.weight.double(), one.lora_down.weight.double()) for one in layers]
        changes = [up.flatten(1) @ down.flatten(1) for up, down in factors]
        return torch.stack([one.scale * change.norm() for one, change in zip(layers, changes, strict=True)])

    before = lengths()
    norms = network.scale_weight_norms(LIMIT)
    assert (lengths() - before.clamp(max=LIMIT)).abs().max() < STEP_ERROR
    assert 0 < norms.scaled == (before > LIMIT).sum() < len(before)
    assert norms.mean == pytest.approx(before.clamp(max=LIMIT).mean().item(), rel=STEP_ERROR)  # kohya's too
    assert norms.largest == pytest.approx(LIMIT)


@pytest.mark.parametrize("autocast", [True, False])
def test_weights_stay_float32_beside_a_model_in_half_precision(model, batch, autocast):
    half = [copy.deepcopy(part).bfloat16() for part in model]
    network = attached(half, conv_dim=2).train()
    inputs = batch | {"noisy": batch["noisy"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        noise = predict(half, inputs)
        loss = nn.functional.mse_loss(noise.float(), batch["noise"])
    loss.backward()
    network.release()
    assert noise.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(network).values())
    exact = attached(model, conv_dim=2)
    expected = predict(model, batch)
    exact.release()
    assert (noise - expected).norm() < BF16_ERROR * expected.norm()


ONLY = {"network_train_unet_only": ("unet",), "network_train_text_encoder_only": ("te1",), "": ("te1", "unet")}


@pytest.mark.parametrize("option", ONLY)
def test_only_what_is_asked_for_is_trained(model, option):
    network = create_network(model[0], [model[1]], NetworkOptions(**({option: True} if option else {})))
    assert network.components == ONLY[option]
    names = {group["name"] for group in network.groups(None, None, 1e-4)}
    assert names == {"unet" if component == "unet" else "textencoder" for component in ONLY[option]}


def test_sdxl_has_the_names_of_sgm_and_two_text_encoders():
    network = create_network(sdxl_unet(), [text_encoder(), text_encoder()], NetworkOptions())
    assert network.components == ("te1", "te2", "unet")
    starts = {name.split("_blocks_")[0].split("_block_")[0].split("_text_")[0] for name in network.layers}
    assert starts == {"lora_te1", "lora_te2", "lora_unet_input", "lora_unet_middle", "lora_unet_output"}
    assert sum(name.startswith("lora_unet") for name in network.layers) == 722


def test_a_block_of_weight_0_has_no_layer_and_its_neighbours_have_their_rates(model):
    weights = {"down_lr_weight": "zeros", "up_lr_weight": [0.0] * 11 + [0.5], "mid_lr_weight": "0"}
    network = create_network(model[0], [], NetworkOptions(**weights))
    assert {name.split("_attentions")[0] for name in network.layers} == {"lora_unet_up_blocks_3"}
    assert [(group["name"], group["lr"]) for group in network.groups(1e-3, None, None)] == [("unet_block24", 5e-4)]
