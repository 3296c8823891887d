"""The room on the disk that a training is told to need, against what trainings wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from toys import sd1_unet, sdxl_unet, text_encoder
from train_runs import options_for, run, tiny_folder, write_pictures

from lib_lora.core.checkpoint import model_keymap
from lib_lora.core.keymap import KeyMap
from lib_lora.train.create_network import create_network
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.network_options import NetworkOptions
from lib_lora.train.room import room_needed, trained_numbers

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

LEAST = 0.9
"""What was told is at most so much too large, where the optimizer has all that it can have."""


def numbers(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def data_bytes(file: Path) -> int:
    """Of its numbers: for so small a model headers count."""
    return sum(tensor.numel() * tensor.element_size() for tensor in load_file(file).values())


@pytest.mark.parametrize("make", [sd1_unet, sdxl_unet])
@pytest.mark.parametrize(
    "given",
    [
        {"network_dim": 4},
        {"network_dim": 4, "conv_dim": 2},
        {"network_dim": 4, "conv_dim": 2, "network_train_unet_only": True},
        {"network_dim": 4, "network_train_text_encoder_only": True},
        {"network_dim": 4, "network_module": "dylora", "unit": 2},
    ],
)
def test_the_numbers_of_a_network_are_known_before_it_is_made(make: Any, given: dict[str, Any]) -> None:
    unet, encoders = make(), [text_encoder()]
    options = NetworkOptions(**given)
    layers = KeyMap.from_modules({"unet": unet, "te1": encoders[0]})
    assert trained_numbers(layers, options) == numbers(create_network(unet, encoders, options))


def test_blocks_count_as_if_all_had_the_largest_rank() -> None:
    unet = sd1_unet()
    dims, alphas = [1, *[0] * 23, 3], [1.0] * 25
    options = NetworkOptions(network_dim=2, block_dims=dims, block_alphas=alphas, network_train_unet_only=True)
    told = trained_numbers(KeyMap.from_modules({"unet": unet}), options)
    assert told == numbers(create_network(unet, [], NetworkOptions(network_dim=3, network_train_unet_only=True)))
    assert told > numbers(create_network(unet, [], options))


@pytest.mark.newest
@pytest.mark.parametrize("cached", [False, True])
def test_a_training_writes_no_more_than_was_told_and_not_much_less(tmp_path: Path, cached: bool) -> None:
    model, pictures, out = tiny_folder(tmp_path / "model"), write_pictures(tmp_path / "pictures"), tmp_path / "out"
    given: dict[str, Any] = {"network_dim": 16, "save_every_n_steps": 1, "save_state_every_n_steps": 1, "ema": True}
    given |= {"max_train_steps": 4, "save_last_n_states": 2, "network_train_unet_only": True}
    if cached:
        given |= {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "flip_aug": True}
        given |= {"cache_dir": tmp_path / "out" / "cache"}
    options = options_for(pictures, out, **given)
    told = room_needed(open_dataset(options.data), model_keymap(model), options, 4)
    torch.manual_seed(0)
    run(model, pictures, out, **given)
    written = sum(data_bytes(file) for file in out.rglob("*.safetensors"))
    # A state that is being written, and the copy among the LoRAs, are gone or elsewhere in the end.
    elsewhere = data_bytes(out / "made.safetensors") + data_bytes(next((out / "made-state").iterdir()))
    assert told * LEAST <= written + elsewhere <= told
