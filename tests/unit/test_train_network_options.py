"""Options of a network: kohya's ways of writing them, and a sentence for each that can not be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib_lora.core.models import BaseModel
from lib_lora.errors import JobError
from lib_lora.train.block_lr import layout_of
from lib_lora.train.create_network import create_network
from lib_lora.train.network_options import NETWORK_ARGS, NetworkOptions
from lib_lora.train.options import TrainOptions
from tests.toys import sd1_unet, text_encoder

SD1 = layout_of(BaseModel.SD1)

GIVEN = {
    "conv_dim": ("8", 8),
    "conv_alpha": ("0.5", 0.5),
    "unit": ("2", 2),
    "rank_dropout": (".1", 0.1),
    "module_dropout": ("0.25", 0.25),
    "block_dims": (",".join(map(str, range(25))), tuple(range(25))),
    "block_alphas": (",".join(["1.5"] * 25), (1.5,) * 25),
    "conv_block_dims": (", ".join(["2"] * 25), (2,) * 25),
    "conv_block_alphas": (",".join(["1"] * 25), (1.0,) * 25),
    "down_lr_weight": ("sine+.25", "sine+.25"),
    "mid_lr_weight": ("0.5", "0.5"),
    "up_lr_weight": ("1,,0.5", "1,,0.5"),
    "block_lr_zero_threshold": ("0.1", 0.1),
    "loraplus_lr_ratio": ("16", 16.0),
    "loraplus_unet_lr_ratio": ("4", 4.0),
    "loraplus_text_encoder_lr_ratio": ("2", 2.0),
}

REFUSED = {
    "there is no network_module 'lycoris.kohya'; there are networks.lora": {"network_module": "lycoris.kohya"},
    "network_args has no 'conv_dims'; did you mean conv_dim?": {"network_args": ["conv_dims=4"]},
    "network_args has no 'xyz'; there are conv_dim, conv_alpha": {"network_args": ["xyz=4"]},
    "network_args holds 'conv_dim'; write conv_dim=VALUE": {"network_args": ["conv_dim"]},
    "conv_dim must be a whole number, not '4.5'": {"network_args": ["conv_dim=4.5"]},
    "network_dim must be at least 0, not -1": {"network_dim": -1},
    "conv_dim must be at least 0, not -4": {"conv_dim": -4},
    "network_alpha must be at least 0, not -1": {"network_alpha": -1.0},
    "rank_dropout is 1; write a share from 0 to below 1": {"rank_dropout": 1.0},
    "network_dropout is nan; write a share": {"network_dropout": float("nan")},
    "loraplus_lr_ratio must be above 0, not 0": {"loraplus_lr_ratio": 0.0},
    "scale_weight_norms must be above 0, not -1": {"scale_weight_norms": -1.0},
    "block_dims holds -1; ranks and alphas are not below 0": {"block_dims": [-1] * 25},
    "down_lr_weight names no curve 'sines'; there are sine, cosine": {"down_lr_weight": "sines"},
    "up_lr_weight names no curve 'sine-1'": {"up_lr_weight": "sine-1"},
    "what is added to the curve of down_lr_weight must be a number, not 'x'": {"down_lr_weight": "sine+x"},
    "number 2 of down_lr_weight must be a number, not 'x'": {"down_lr_weight": "1,x,3"},
    "number 1 of mid_lr_weight must be a number, not '.'": {"mid_lr_weight": "."},
    "up_lr_weight is one number for many blocks, 0.5; write zeros+0.5 for all, or a list": {"up_lr_weight": [0.5]},
    "leave nothing to train": {"network_train_unet_only": True, "network_train_text_encoder_only": True},
    "say which with network_weights": {"dim_from_weights": True},
    "network_dim 4 has no parts of unit 3": {"network_module": "dylora", "unit": 3},
    "conv_dim is 2 and network_dim 4": {"network_module": "networks.dylora", "conv_dim": 2},
    "DyLoRA has one rank for all layers; leave block_dims out": {"network_module": "dylora", "block_dims": [4] * 25},
}


def test_every_one_of_kohyas_arguments_is_read():
    assert GIVEN.keys() == {*NETWORK_ARGS}


@pytest.mark.parametrize("name", GIVEN)
def test_an_argument_of_kohyas_is_the_option_of_that_name(name):
    text, value = GIVEN[name]
    assert getattr(NetworkOptions(network_args=[f"{name}={text}"]), name) == value
    assert getattr(TrainOptions.of({name: text}).network, name) == value


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_can_not_be_is_refused_in_a_sentence(sentence):
    with pytest.raises(JobError) as refused:
        NetworkOptions(**REFUSED[sentence])
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("value", "first"),
    [([0.5, 0.25], (0.5, 0.25)), ((1, 2), (1.0, 2.0)), ("0.5,0.25", (0.5, 0.25)), ("linear+0.5", (0.5, 0.5 + 1 / 11))],
)
def test_rates_of_blocks_are_lists_texts_or_curves(value, first):
    weights = TrainOptions.of({"down_lr_weight": value}).network.lr_weights(SD1)
    assert weights.blocks[:2] == pytest.approx(first)
    assert len(weights.blocks) == 25


def test_arguments_are_written_as_kohya_takes_them():
    given = {"conv_dim": "8", "block_dims": ",".join(["2"] * 25), "down_lr_weight": "sine+0.25"}
    options = NetworkOptions(network_args=[f"{name}={text}" for name, text in given.items()])
    assert options.given_arguments() == given
    again = NetworkOptions(network_args=[f"{name}={text}" for name, text in options.given_arguments().items()])
    assert again.given_arguments() == given
    assert NetworkOptions().given_arguments() == {}


def test_defaults_are_kohyas():
    options = NetworkOptions()
    assert (options.network_dim, options.network_alpha, options.conv_dim, options.unit) == (4, 1.0, None, 1)
    assert options.lr_weights(SD1) is None
    assert TrainOptions.of({"network_weights": "a/b.safetensors"}).network.network_weights == Path("a/b.safetensors")


NOTES = {
    "down_lr_weight holds 3 numbers for 12 blocks: the rest is 1": {"down_lr_weight": "1,1,1"},
    "up_lr_weight holds 13 numbers for 12 blocks: the rest is not used": {"up_lr_weight": [1.0] * 13},
    "block_alphas has no effect without block_dims": {"block_alphas": [1.0] * 25},
    "conv_block_alphas has no effect without conv_block_dims": {
        "block_dims": [4] * 25,
        "conv_block_alphas": [2.0] * 25,
        "conv_dim": 4,
    },
    "conv_alpha has no effect on DyLoRA": {"network_module": "dylora", "conv_dim": 4, "conv_alpha": 2.0},
    "unit has no effect on a network that is no DyLoRA": {"unit": 2},
}


@pytest.mark.parametrize("note", NOTES)
def test_what_has_no_effect_is_told(note):
    network = create_network(sd1_unet(), [text_encoder(layers=1)], NetworkOptions(**NOTES[note]))
    (found,) = network.notes
    assert note in found


@pytest.mark.parametrize(
    "nothing", [{"block_dims": [0] * 25}, {"down_lr_weight": "zeros", "mid_lr_weight": "0", "up_lr_weight": "zeros"}]
)
def test_nothing_to_train_is_refused(nothing):
    with pytest.raises(JobError, match="leave no layer to train"):
        create_network(sd1_unet(), [], NetworkOptions(**nothing))


def test_a_rank_of_0_leaves_its_layers_alone_and_no_others():
    def ranks(**given) -> set[tuple[bool, int]]:
        network = create_network(sd1_unet(), [], NetworkOptions(**given))
        return {(layer.lora_down.weight.shape[2:] == (3, 3), layer.rank) for layer in network.layers.values()}

    assert ranks(network_dim=2, conv_dim=0) == {(False, 2)}
    assert ranks(network_dim=0, conv_dim=2) == {(True, 2)}


def test_alphas_of_larger_convolutions_of_blocks_count_with_their_ranks_alone():
    blocks = {"block_dims": [2] * 25, "conv_block_alphas": [5.0] * 25}

    def alphas(**given) -> set[float]:
        layers = create_network(sd1_unet(), [], NetworkOptions(**blocks, **given)).layers.values()
        return {layer.alpha.item() for layer in layers if layer.lora_down.weight.shape[2:] == (3, 3)}

    assert alphas(conv_dim=4, conv_alpha=3.0) == {3.0}
    assert alphas(conv_block_dims=[4] * 25) == {5.0}


def test_the_same_seed_makes_the_same_network():
    unet, made = sd1_unet(), []
    for _ in range(2):
        torch.manual_seed(4)
        made.append(create_network(unet, [], NetworkOptions(conv_dim=2)).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
