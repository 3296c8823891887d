"""Trains the demo model's UNet and text encoder together on cached latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from .drawing import Scene, random_scene
from .networks import new_scheduler, new_text_encoder, new_unet
from .train_vae import as_batch, encode
from .training import Average, Ema, cosine_steps, seeded

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

PICTURES = 10_000
BATCH = 64
EMPTY_CAPTIONS = 0.1


class Denoiser(torch.nn.Module):
    """UNet and text encoder, trained as one."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet: UNet2DConditionModel = new_unet()
        self.text_encoder: CLIPTextModel = new_text_encoder(tokenizer)

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predicted noise, (N, 4, 8, 8), for latents at `times` (N,) and token ids (N, 77)."""
        return self.unet(noisy, times, self.text_encoder(tokens)[0], return_dict=False)[0]


class Dataset(NamedTuple):
    """Pictures as the UNet learns them.

    Attributes:
        latents: Scaled, (N, 4, 8, 8).
        tokens: Of the captions, (N, 77).
    """

    latents: torch.Tensor
    tokens: torch.Tensor


def train_unet(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, steps: int, saved: Callable[[Denoiser], None]
) -> tuple[Denoiser, float]:
    """The averaged weights and the last mean squared error of the noise.

    Args:
        vae: Trained autoencoder.
        tokenizer: Of the captions.
        seed: Of weights, pictures and noise.
        steps: Optimiser steps.
        saved: Called now and then with the averaged weights so far.
    """
    data = new_dataset(vae, tokenizer, seeded(seed))
    model, error = Denoiser(tokenizer), Average(0.995)
    ema = Ema(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    for step in cosine_steps(optimizer, steps, "unet", error):
        if step:
            ema.update(model)
        picks = torch.randint(PICTURES, (BATCH,))
        loss = noise_loss(model, data.latents[picks], data.tokens[picks])
        loss.backward()
        error.add(loss.item())
        if step % 300 == 299:
            saved(ema.module)
    ema.update(model)
    saved(ema.module)
    return ema.module, error.value


def new_dataset(vae: AutoencoderKL, tokenizer: CLIPTokenizer, rng: random.Random) -> Dataset:
    """PICTURES plain scenes, a tenth of them with an empty caption."""
    scenes = [random_scene(rng) for _ in range(PICTURES)]
    latents = torch.cat([encode(vae, as_batch(scenes[i : i + 500])) for i in range(0, PICTURES, 500)])
    return Dataset(latents, tokenize(tokenizer, [short_caption(scene, rng) for scene in scenes]))


def short_caption(scene: Scene, rng: random.Random) -> str:
    """Mostly the whole caption; sometimes a part of it, or nothing, so that short and empty prompts work too."""
    kind = rng.random()
    if kind < EMPTY_CAPTIONS:
        return ""
    if kind < EMPTY_CAPTIONS + 0.05:
        return scene.caption.split(" on ")[0]
    if kind < EMPTY_CAPTIONS + 0.12:
        return f"{scene.colour} {scene.shape}, {scene.background} background"
    return scene.caption


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids, (N, 77), padded."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def noise_loss(model: torch.nn.Module, latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the noise at random times."""
    scheduler = new_scheduler()
    noise = torch.randn_like(latents)
    times: Any = torch.randint(scheduler.config["num_train_timesteps"], (len(latents),))
    return functional.mse_loss(model(scheduler.add_noise(latents, noise, times), times, tokens), noise)
