"""Random ControlNet models for the checkpoint of `make_models`, as the ControlNet extension v1.1.455 loads them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lib_lora.core.saving import save_bytes, save_tensors
from tests.webui_real.make_models import small_unet

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

MISSING = (
    "tests/webui_real/test_controlnet.py did not run: set CONTROLNET_ROOT to the folder of the extension "
    "Mikubill/sd-webui-controlnet v1.1.455, whose requirements WEBUI_PYTHON has"
)
CONTROLNET, ADAPTER, LLLITE = "smallcontrol", "smalladapter", "smalllllite"
HINT_CHANNELS = 3 * 8 * 8
"""Of a T2I adapter: each block of 8 x 8 RGB pixels is one pixel for it."""
WIDTH_SCRIPT = '''\
"""The ControlNet extension takes each ControlNet of SD1 to be 320 channels wide; here it is as wide as the model."""

import sys

from modules import script_callbacks


def set_width(*_):
    sys.modules["scripts.controlnet_model_guess"].controlnet_default_config["model_channels"] = {channels}


script_callbacks.on_app_started(set_width)
'''


def make_controlnet(folder: Path, *, channels: int = 32, seed: int = 0) -> None:
    """Write a model of each kind, and a script that tells the extension how wide the ControlNet is.

    Args:
        folder: A data folder of the WebUI.
        channels: Width of the UNet's first level, as in `make_models`.
        seed: Of all weights.
    """
    place = folder / "models/ControlNet"
    place.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        control, adapter, lllite = _controlnet(channels).state_dict(), _adapter(channels), _lllite(channels)
    for name, tensors in ((CONTROLNET, control), (ADAPTER, adapter), (LLLITE, lllite)):
        save_tensors(place / f"{name}.safetensors", tensors, overwrite=True)
    script = folder / "extensions/smallcontrol/scripts/width.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    save_bytes(script, WIDTH_SCRIPT.format(channels=channels).encode(), overwrite=True)


def _controlnet(channels: int) -> nn.Module:
    """A copy of the UNet's encoder, as training starts it, with convolutions in place of zeros behind it."""
    from diffusers import ControlNetModel

    model = ControlNetModel.from_unet(small_unet(channels))
    for conv in (*model.controlnet_down_blocks, model.controlnet_mid_block):
        _fill(conv, 1.0)
    embedding = model.controlnet_cond_embedding
    for conv in (embedding.conv_in, *embedding.blocks, embedding.conv_out):
        _fill(conv, 1.7)  # SiLU takes away that much
    return model


def _fill(conv: nn.Module, gain: float) -> None:
    conv.weight.copy_(torch.randn_like(conv.weight) * gain / math.sqrt(conv.weight[0].numel()))


def _adapter(channels: int) -> dict[str, Tensor]:
    """Four levels of two blocks (T2I-Adapter, Mou et al. 2023), under the names of its authors."""
    widths = [channels * factor for factor in (1, 2, 4, 4)]
    tensors = _conv("conv_in", HINT_CHANNELS, channels, 3)
    before = channels
    for level, width in enumerate(widths):
        for block in (2 * level, 2 * level + 1):
            if before != width:
                tensors |= _conv(f"body.{block}.in_conv", before, width, 1)
            tensors |= _conv(f"body.{block}.block1", width, width, 3) | _conv(f"body.{block}.block2", width, width, 1)
            before = width
    return tensors


def _lllite(channels: int) -> dict[str, Tensor]:
    """What is added to the inputs of the self-attentions' queries (ControlNet-LLLite, kohya-ss 2023)."""
    inner = 16
    tensors: dict[str, Tensor] = {}
    for name, width in (("input_blocks_1", channels), ("middle_block", 4 * channels), ("output_blocks_11", channels)):
        prefix = f"lllite_unet_{name}_1_transformer_blocks_0_attn1_to_q"
        tensors |= _conv(f"{prefix}.conditioning1.0", 3, inner // 2, 4)
        tensors |= _conv(f"{prefix}.conditioning1.2", inner // 2, inner, 2)
        for part, inputs, outputs in (("down", width, inner), ("mid", 2 * inner, inner), ("up", inner, width)):
            tensors[f"{prefix}.{part}.0.weight"] = 2 * torch.randn(outputs, inputs) / math.sqrt(inputs)
            tensors[f"{prefix}.{part}.0.bias"] = torch.zeros(outputs)
    return tensors


def _conv(name: str, inputs: int, outputs: int, size: int) -> dict[str, Tensor]:
    weight = torch.randn(outputs, inputs, size, size) / math.sqrt(inputs * size * size)
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(outputs)}
