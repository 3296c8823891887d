"""ControlNets that control something: copies of a UNet whose convolutions of zeros hold small random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

SPREAD = 0.3
OF_ZEROS = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")


def controlnet_of(unet, seed: int = 0, **options) -> nn.Module:
    """Diffusers' copy of a UNet's half; the copied weights differ from the UNet's a little, as after training."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    model = ControlNetModel.from_unet(unet, **options).eval().requires_grad_(False)
    if unet.dtype != torch.float32:
        model.to(unet.dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(
                ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
            ):
                weight.normal_(std=SPREAD / weight[0].numel() ** 0.5)
            elif weight.ndim > 1:
                weight.mul_(1 + 0.05 * torch.randn_like(weight))
    return model


def controlnet_lora(layers, name: str = "controlnet", **options) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA in kohya's format whose keys name a ControlNet; options as `toys.lora_tensors`."""
    from tests.toys import lora_tensors

    as_unet = [_Renamed(layer) for layer in layers]
    prefix = f"lora_{name}_"
    return {key.replace("lora_unet_", prefix, 1): tensor for key, tensor in lora_tensors(as_unet, **options).items()}


class _Renamed:
    """A layer of a ControlNet as the UNet's that it is a copy of."""

    def __init__(self, layer) -> None:
        self.key = f"unet.{layer.key.partition('.')[2]}"
        self.shape = layer.shape
