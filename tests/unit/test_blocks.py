"""Blocks of layers."""

import re

import pytest

from lib_lora.core.blocks import block_of
from lib_lora.core.keymap import KeyMap
from tests.fullsize import diffusers_model


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("input_blocks.0.0", "IN00"),
        ("input_blocks.3.0.op", "IN03"),
        ("input_blocks.11.0.in_layers.2", "IN11"),
        ("middle_block.1.proj_in", "M00"),
        ("output_blocks.0.0.in_layers.2", "OUT00"),
        ("output_blocks.10.1.proj_in", "OUT10"),
        ("time_embed.0", ""),
        ("label_emb.0.0", ""),
        ("out.2", ""),
        ("", ""),
        ("input_blocks", ""),
        ("input_blocks.x.0", ""),
    ],
)
def test_a_unet_layer_is_in_the_block_its_ldm_name_says(path, block):
    assert block_of("unet", path) == block


@pytest.mark.parametrize("component", ["te1", "te2"])
def test_all_of_a_text_encoder_is_the_base_block(component):
    assert block_of(component, "") == "BASE"


def test_a_transformer_model_has_no_such_blocks():
    assert block_of("transformer", "") == ""


@pytest.mark.parametrize(
    ("path", "block"),
    [
        *((f"{name}.weight", "IN") for name in ("img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer")),
        ("guidance_in.in_layer", "IN"),
        ("double_blocks.0.img_attn.qkv", "D00"),
        ("double_blocks.18.txt_mlp.2", "D18"),
        ("single_blocks.0.linear1", "S00"),
        ("single_blocks.37.modulation.lin", "S37"),
        ("final_layer.linear", "OUT"),
        ("joint_blocks.3.x_block.attn.qkv", ""),
    ],
)
def test_a_layer_of_flux_is_in_the_block_its_original_name_says(path, block):
    assert block_of("transformer", path) == block


# Block → residual blocks, transformer layers, sampling, channels: by the UNets' configurations.
SD1 = {"IN00": (0, 0, "", 320), "M00": (2, 1, "", 1280)}
SD1 |= {f"IN{number:02d}": (1, 1, "", channels) for number, channels in ((1, 320), (2, 320), (4, 640), (5, 640))}
SD1 |= {"IN07": (1, 1, "", 1280), "IN08": (1, 1, "", 1280)}
SD1 |= {f"IN{number:02d}": (0, 0, "down", channels) for number, channels in ((3, 320), (6, 640), (9, 1280))}
SD1 |= {"IN10": (1, 0, "", 1280), "IN11": (1, 0, "", 1280)}
SD1 |= {"OUT00": (1, 0, "", 1280), "OUT01": (1, 0, "", 1280), "OUT02": (1, 0, "up", 1280)}
SD1 |= {"OUT03": (1, 1, "", 1280), "OUT04": (1, 1, "", 1280), "OUT05": (1, 1, "up", 1280)}
SD1 |= {"OUT06": (1, 1, "", 640), "OUT07": (1, 1, "", 640), "OUT08": (1, 1, "up", 640)}
SD1 |= {f"OUT{number:02d}": (1, 1, "", 320) for number in (9, 10, 11)}
SDXL = {"IN00": (0, 0, "", 320), "IN01": (1, 0, "", 320), "IN02": (1, 0, "", 320), "IN03": (0, 0, "down", 320)}
SDXL |= {"IN04": (1, 2, "", 640), "IN05": (1, 2, "", 640), "IN06": (0, 0, "down", 640)}
SDXL |= {"IN07": (1, 10, "", 1280), "IN08": (1, 10, "", 1280), "M00": (2, 10, "", 1280)}
SDXL |= {"OUT00": (1, 10, "", 1280), "OUT01": (1, 10, "", 1280), "OUT02": (1, 10, "up", 1280)}
SDXL |= {"OUT03": (1, 2, "", 640), "OUT04": (1, 2, "", 640), "OUT05": (1, 2, "up", 640)}
SDXL |= {f"OUT{number:02d}": (1, 0, "", 320) for number in (6, 7, 8)}


@pytest.mark.parametrize(("family", "table"), [("sd1", SD1), ("sd2", SD1), ("sdxl", SDXL)])
def test_the_blocks_of_real_models_hold_what_the_table_of_the_extension_says(family, table):
    found = {}
    for layer in KeyMap.from_modules({"unet": diffusers_model(family)["unet"]}):
        found.setdefault(layer.block, []).append(layer)
    assert {block: contents(layers) for block, layers in found.items() if block} == table


def contents(layers) -> tuple[int, int, str, int]:
    """Residual blocks, transformer layers, sampling and channels of a block."""

    def named(pattern: str) -> set[str]:
        return {match[1] for layer in layers if (match := re.search(pattern, layer.key))}

    (channels,) = {one.shape[0] for one in layers if one.key.endswith(("conv1", "conv_in", "samplers.0.conv"))}
    sampling = "".join(named(r"(down|up)samplers"))
    return len(named(r"resnets\.(\d+)")), len(named(r"transformer_blocks\.(\d+)")), sampling, channels
