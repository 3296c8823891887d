"""Blocks of layers."""

import pytest

from lib_lora.core.blocks import block_of


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
