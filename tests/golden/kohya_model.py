"""The tiny Stable Diffusion 1 whose LoRA results kohya's scripts computed, as diffusers and transformers modules."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent / "sd1"


def checkpoint(name: str = "base") -> dict[str, torch.Tensor]:
    return load_file(HERE / f"{name}.safetensors")


def unet_keys() -> dict[str, str]:
    """LDM key in the checkpoint → diffusers name, made with kohya's converter."""
    names = json.loads((HERE / "ldm_to_diffusers_unet_keys.json").read_text())
    return {f"model.diffusion_model.{ldm}": diffusers for ldm, diffusers in names.items()}


def te_key(module: torch.nn.Module, key: str) -> str:
    """A checkpoint's text encoder key as this version of transformers names it."""
    name = key.removeprefix("cond_stage_model.transformer.")
    known = dict(module.named_parameters())
    return name if name in known else name.removeprefix("text_model.")


def build(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.nn.Module]:
    """UNet and text encoder with the checkpoint's weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = json.loads((HERE / "config.json").read_text())
    weights = checkpoint()
    unet = UNet2DConditionModel.from_config(config["unet_diffusers"])
    keys = unet_keys()
    found = {keys[key]: tensor for key, tensor in weights.items() if key in keys}
    unet.load_state_dict(
        {name: found[name].reshape(tensor.shape) for name, tensor in unet.state_dict().items()}, strict=True
    )
    te = CLIPTextModel(CLIPTextConfig(**config["clip_text"]))
    loaded = {te_key(te, key): tensor for key, tensor in weights.items() if "transformer.text_model" in key}
    missing, _ = te.load_state_dict(loaded, strict=False)
    if set(missing) - {name for name, _ in te.named_buffers()}:
        raise RuntimeError(f"the checkpoint lacks {missing}")
    return unet.to(dtype).eval().requires_grad_(False), te.to(dtype).eval().requires_grad_(False)
