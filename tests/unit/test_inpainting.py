"""Inpainting models read 9 channels; LoRAs made for 4 change the first ones."""

from __future__ import annotations

import pytest
import torch
from toys import digest, sd1_unet

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.core.keymap import KeyMap
from lib_lora.core.ldm_names import diffusers_to_ldm, translate
from lib_lora.core.network import load_network
from lib_lora.core.plan import match_network
from lib_lora.core.saving import save_tensors
from lib_lora.errors import ShapeMismatchError

OUT, RANK = 8, 2
FLOAT_ERROR = 1e-6


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def conv_in(channels: int) -> dict[str, dict[str, torch.Tensor]]:
    """An update of the first convolution by each family that makes sense there."""
    return {
        "lora": {"lora_up.weight": random(OUT, RANK, 1, 1), "lora_down.weight": random(RANK, channels, 3, 3)},
        "tucker": {
            "lora_up.weight": random(OUT, RANK, 1, 1),
            "lora_down.weight": random(RANK, channels, 1, 1),
            "lora_mid.weight": random(RANK, RANK, 3, 3),
        },
        "full": {"diff": random(OUT, channels, 3, 3), "diff_b": random(OUT)},
        "loha": {
            f"hada_w{i}_{side}": random(*shape)
            for i in (1, 2)
            for side, shape in (("a", (OUT, RANK)), ("b", (RANK, channels * 9)))
        },
        "dora": {
            "lora_up.weight": random(OUT, RANK, 1, 1),
            "lora_down.weight": random(RANK, channels, 3, 3),
            "dora_scale": random(OUT, 1, 1, 1).abs(),
        },
    }


FAMILIES = tuple(conv_in(4))


def write(folder, family: str, channels: int) -> None:
    tensors = {f"lora_unet_conv_in.{role}": tensor for role, tensor in conv_in(channels)[family].items()}
    save_tensors(folder / f"{family}.safetensors", tensors, {}, overwrite=True)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return sd1_unet(in_channels=9)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_for_4_channels_changes_the_first_4_of_9(unet, family, tmp_path):
    write(tmp_path, family, 4)
    before, base = digest(unet), unet.conv_in.weight.detach().clone()
    session = LoraSession({"unet": unet}, LoraCatalog([tmp_path]))
    report = session.set([(family, 0.7)])
    assert not report.refused
    delta = load_network(tmp_path / f"{family}.safetensors").adapters["unet:conv_in"].delta_weight(base[:, :4])
    expected = base.clone()
    expected[:, :4] += 0.7 * delta
    torch.testing.assert_close(unet.conv_in.weight.detach(), expected, atol=FLOAT_ERROR, rtol=0)
    assert torch.equal(unet.conv_in.weight[:, 4:], base[:, 4:])
    session.clear()
    assert digest(unet) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_for_9_channels_changes_all_of_them(unet, family, tmp_path):
    write(tmp_path, family, 9)
    base = unet.conv_in.weight.detach().clone()
    LoraSession({"unet": unet}, LoraCatalog([tmp_path])).set([(family, 1.0)])
    assert (unet.conv_in.weight != base).flatten(2).any(2).any(0).all()


@pytest.mark.parametrize("family", ["lora", "tucker", "loha"])
def test_hook_mode_pads_too(unet, family, tmp_path):
    write(tmp_path, family, 4)
    x, outputs = random(1, 9, 8, 8), []
    for mode in ("prefuse", "hook"):
        session = LoraSession({"unet": unet}, LoraCatalog([tmp_path]), mode=mode)
        session.set([(family, 0.7)])
        with torch.no_grad():
            outputs.append(unet.conv_in(x))
        session.unload()
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [3, 5, 8])
def test_any_other_number_of_channels_is_refused_with_both_shapes(unet, channels, tmp_path):
    write(tmp_path, "lora", channels)
    network = load_network(tmp_path / "lora.safetensors")
    with pytest.raises(ShapeMismatchError, match=rf"\(8, 9, 3, 3\) here, \(8, {channels}, 3, 3\) in the LoRA"):
        match_network(KeyMap.from_modules({"unet": unet}), network)


def test_a_model_of_4_channels_is_not_narrowed(tmp_path):
    write(tmp_path, "lora", 9)
    network = load_network(tmp_path / "lora.safetensors")
    with pytest.raises(ShapeMismatchError, match=r"\(8, 4, 3, 3\) here, \(8, 9, 3, 3\) in the LoRA"):
        match_network(KeyMap.from_modules({"unet": sd1_unet()}), network)


def test_a_checkpoint_of_an_inpainting_model_is_padded_too(unet, tmp_path):
    write(tmp_path, "lora", 4)
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    table = diffusers_to_ldm([name.rpartition(".")[0] for name in shapes])
    ldm = {
        f"model.diffusion_model.{translate(path, table)}.{tail}": shape
        for name, shape in shapes.items()
        for path, _, tail in [name.rpartition(".")]
    }
    match = match_network(KeyMap.from_checkpoint(ldm), load_network(tmp_path / "lora.safetensors"))
    ((layer, adapter),) = match.layers
    assert layer.parameter == "model.diffusion_model.input_blocks.0.0.weight"
    assert adapter.fits((8, 9, 3, 3))
