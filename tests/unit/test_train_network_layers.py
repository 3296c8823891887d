"""One layer in training: its arithmetic in float64, what it leaves out, and DyLoRA's units."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lib_lora.core.network import load_network
from lib_lora.tools.dylora import SCALE, split_dylora
from lib_lora.train.adapters import Dropouts, DyloraLayer, LoraLayer, Units
from lib_lora.train.create_network import create_network
from lib_lora.train.network_file import network_tensors, save_network
from lib_lora.train.network_options import NetworkOptions
from tests.toys import sd1_inputs, tiny_sd1

EXACT = 1e-12  # float64
FLOAT_ERROR = 1e-6
FROM_BEST = 1.7  # times the least error a matrix of that rank can have
RANK, ALPHA, UNIT = 6, 3.0, 2

LAYERS = {
    "linear": (nn.Linear(10, 7), (3, 10)),
    "linear of tokens": (nn.Linear(10, 7), (3, 5, 10)),
    "1x1": (nn.Conv2d(10, 7, 1), (3, 10, 6, 6)),
    "3x3": (nn.Conv2d(10, 7, 3, padding=1), (3, 10, 6, 6)),
    "downsampling": (nn.Conv2d(10, 7, 3, stride=2, padding=1), (3, 10, 6, 6)),
    "circular": (nn.Conv2d(10, 7, 3, padding=1, padding_mode="circular"), (3, 10, 6, 6)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def made(kind: str, **dropouts) -> tuple[nn.Module, LoraLayer, torch.Tensor]:
    """Base, layer with random factors, and input, all in float64."""
    torch.manual_seed(0)
    base, shape = LAYERS[kind]
    layer = LoraLayer(base, RANK, ALPHA, Dropouts(**dropouts)).double()
    nn.init.normal_(layer.lora_up.weight)
    return base.double(), layer, torch.randn(shape, dtype=torch.float64)


def product(base: nn.Module, layer: LoraLayer, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """alpha / rank · up · diag(kept) · down applied to `x` as one dense weight, picture by picture."""
    up, down = layer.lora_up.weight.flatten(1), layer.lora_down.weight.flatten(1)
    kept = torch.ones(len(x), RANK, dtype=x.dtype) if kept is None else kept.to(x.dtype)
    outputs = []
    for index, one in enumerate(x):
        weight = (ALPHA / RANK * up @ torch.diag(kept[index]) @ down).reshape(base.weight.shape)
        dense = functional.linear(one, weight) if isinstance(base, nn.Linear) else base._conv_forward(one, weight, None)
        outputs.append(dense)
    return torch.stack(outputs)


@every_layer
def test_a_layer_computes_its_formula(kind):
    base, layer, x = made(kind)
    assert (layer(x) - product(base, layer, x)).abs().max() < EXACT
    layer.multiplier = -0.7
    expected = base(x) - 0.7 * product(base, layer, x)
    assert (layer.add(base, (x,), base(x)) - expected).abs().max() < EXACT


@every_layer
def test_rank_dropout_leaves_ranks_of_each_picture_out_and_scales_the_others_up(kind):
    base, layer, x = made(kind, rank=0.4)
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    kept = torch.rand(len(x), RANK) > 0.4
    assert 0 < kept.sum() < kept.numel()
    assert (found - product(base, layer, x, kept) / 0.6).abs().max() < EXACT
    assert (layer.eval()(x) - product(base, layer, x)).abs().max() < EXACT


@every_layer
def test_neuron_dropout_is_torchs_between_the_factors_and_before_rank_dropout(kind):
    _, layer, x = made(kind, neuron=0.5, rank=0.4)
    torch.manual_seed(6)
    found = layer(x)
    torch.manual_seed(6)
    hidden = functional.dropout(layer.lora_down(x), 0.5)
    kept = (torch.rand(len(x), RANK) > 0.4).to(x.dtype)
    hidden = hidden * (kept.reshape(3, *(1,) * (x.ndim - 2), RANK) if "linear" in kind else kept[:, :, None, None])
    assert (found - layer.lora_up(hidden) * (ALPHA / RANK / 0.6)).abs().max() < EXACT


def test_module_dropout_leaves_out_whole_forwards_in_training_alone():
    base, layer, x = made("linear", module=0.25)
    output = base(x)
    torch.manual_seed(7)
    left_out = [torch.equal(layer.add(base, (x,), output), output) for _ in range(400)]
    torch.manual_seed(7)
    assert left_out == [torch.rand(1).item() < 0.25 for _ in range(400)]
    assert 60 < sum(left_out) < 140
    layer.eval()
    assert not any(torch.equal(layer.add(base, (x,), output), output) for _ in range(20))


def test_alpha_0_stands_for_the_rank():
    layer = LoraLayer(nn.Linear(3, 3), RANK, 0)
    assert (layer.alpha.item(), layer.scale) == (RANK, 1)


@pytest.fixture(scope="module")
def model():
    return tiny_sd1()


@pytest.fixture(scope="module")
def inputs():
    return sd1_inputs()


def dylora(model, **options):
    torch.manual_seed(3)
    options = {"network_dim": RANK, "network_alpha": ALPHA, "conv_dim": RANK, "unit": UNIT} | options
    network = create_network(model[0], [model[1]], NetworkOptions(network_module="networks.dylora", **options))
    for layer in network.layers.values():
        nn.init.normal_(layer.lora_up.weight, std=0.1)
    network.attach()
    return network


def started(network) -> set[int]:
    return {layer.units.start for layer in network.layers.values() if layer.component == "unet"}


def test_a_forward_trains_one_unit_of_all_layers_and_each_unit_has_its_turn(model, inputs):
    network = dylora(model)
    seen = set()
    for _ in range(12):
        network.zero_grad()
        model[0](*inputs).sample.square().mean().backward()
        (start,) = started(network)
        seen.add(start)
        for layer in network.layers.values():
            if layer.component == "unet":
                rows = layer.lora_down.weight.grad.flatten(1).abs().sum(1) > 0
                columns = layer.lora_up.weight.grad.flatten(1).abs().sum(0) > 0
                expected = [start <= rank < start + UNIT for rank in range(RANK)]
                assert rows.tolist() == columns.tolist() == expected
    network.release()
    assert seen == {0, 2, 4}


def same_layers(cut, network) -> None:
    """That a file has the effect which ``dyn=`` gives the whole one."""
    assert cut.ranks == network.ranks
    for name, adapter in cut.adapters.items():
        base = torch.empty(adapter.shape)
        difference = adapter.delta_weight(base) - network.adapters[name].delta_weight(base)
        assert difference.abs().max() < FLOAT_ERROR, name


def test_a_forward_in_training_is_that_of_the_file_that_is_cut_there(model, inputs, tmp_path):
    network = dylora(model)
    path = tmp_path / "whole.safetensors"
    save_network(path, network_tensors(network), SCALE)
    split_dylora(path, tmp_path / "cut.safetensors", UNIT)
    found = {}
    with torch.no_grad():
        while len(found) < RANK // UNIT:
            noise = model[0](*inputs).sample
            (start,) = started(network)
            found[start + UNIT] = noise
        whole = network.eval() and model[0](*inputs).sample
        network.release()
        for rank, noise in found.items():
            file = path if rank == RANK else tmp_path / f"cut-{rank:04d}.safetensors"
            same_layers(load_network(file), load_network(path).with_rank(rank))
            options = NetworkOptions(network_weights=file, dim_from_weights=True, network_train_unet_only=True)
            cut = create_network(model[0], [model[1]], options)
            cut.attach()
            assert (model[0](*inputs).sample - noise).abs().max() < FLOAT_ERROR
            cut.release()
    assert torch.equal(whole, found[RANK])
    assert (found[UNIT] - whole).abs().max() > 100 * FLOAT_ERROR


def test_text_encoder_and_unet_draw_their_own_units_from_torchs_generator(model, inputs):
    network = dylora(model)
    drawn = []
    for _ in range(2):
        torch.manual_seed(11)
        for _ in range(5):
            model[1](torch.tensor([[0, 5, 2]]))
            model[0](*inputs)
            drawn.append({layer.component: layer.units.start for layer in network.layers.values()})
    network.release()
    assert drawn[:5] == drawn[5:]
    assert any(units["te1"] != units["unet"] for units in drawn)


def test_each_unit_learns_what_those_before_it_leave_over():
    torch.manual_seed(0)
    base = nn.Linear(24, 24)
    sizes = torch.tensor([2 / (index + 1) if index < 12 else 0.0 for index in range(24)])
    target = torch.linalg.qr(torch.randn(24, 24))[0] * sizes @ torch.linalg.qr(torch.randn(24, 24))[0].T
    layer = DyloraLayer(base, 8, 8.0)
    layer.units = Units(8, UNIT)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        layer.units.draw()
        x = torch.randn(64, 24)
        optimizer.zero_grad()
        (layer(x) - x @ target.T).square().mean().backward()
        optimizer.step()
        schedule.step()
    down, up, scale = layer.eval().factors()
    left = [(scale * up[:, :rank] @ down[:rank] - target).square().sum().item() for rank in range(UNIT, 9, UNIT)]
    best = [sizes[rank:].square().sum().item() for rank in range(UNIT, 9, UNIT)]
    assert left == sorted(left, reverse=True)
    assert all(one < FROM_BEST * other for one, other in zip(left, best, strict=True))
