"""Trains the demo model's autoencoder on pictures drawn as they are needed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .drawing import Scene, draw_array, random_scene
from .networks import new_vae
from .training import Average, cosine_steps, seeded

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

PICTURES = 6000
# Share of the loss that compares neighbouring pixels' differences: edges stay sharp.
EDGE_WEIGHT = 0.25
KL_WEIGHT = 3e-4


class Round(NamedTuple):
    """A stretch of training whose learning rate falls from `rate` to almost nothing."""

    steps: int
    batch: int
    rate: float


ROUNDS = (Round(2000, 16, 1.5e-3), Round(4500, 8, 2e-3))


def as_batch(scenes: Iterable[Scene]) -> torch.Tensor:
    """(N, 3, 64, 64) float32 in -1..1."""
    pictures = torch.from_numpy(np.stack([draw_array(scene) for scene in scenes]))
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(
    seed: int, saved: Callable[[AutoencoderKL], None], rounds: tuple[Round, ...]
) -> tuple[AutoencoderKL, float]:
    """The trained autoencoder with its scaling factor set, and its last mean L1 error (pixels in -1..1).

    Args:
        seed: Of weights, pictures and noise.
        saved: Called now and then with the weights so far.
        rounds: One after the other.
    """
    rng = seeded(seed)
    pictures = as_batch(varied_scene(rng) for _ in range(PICTURES))
    vae, error = new_vae(), Average()
    for number, part in enumerate(rounds):
        optimizer = torch.optim.AdamW(vae.parameters(), lr=part.rate, weight_decay=1e-3)
        for step in cosine_steps(optimizer, part.steps, f"vae {number}", error):
            loss, l1 = vae_loss(vae, pictures[torch.randint(PICTURES, (part.batch,))])
            loss.backward()
            error.add(l1)
            if step % 300 == 299:
                saved(vae)
    vae.register_to_config(scaling_factor=round(latent_scale(vae, pictures[:512]), 4))
    saved(vae)
    return vae, error.value


def varied_scene(rng: random.Random) -> Scene:
    """A scene with or without stripes and outline, so the autoencoder can show what the LoRAs will ask for."""
    stripes, outline = (rng.choice((0.0, 0.0, rng.random(), 1.0)) for _ in range(2))
    return replace(random_scene(rng), stripes=stripes, outline=outline)


def vae_loss(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, float]:
    """L1 and square of the pixels' error, L1 of the edges', a small pull to a unit normal; and the first alone."""
    latents: Any = vae.encode(pictures, return_dict=False)[0]
    error: torch.Tensor = vae.decode(latents.sample(), return_dict=False)[0] - pictures
    l1 = error.abs().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = latents.kl().mean() / latents.mean[0].numel()
    return l1 + error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl, l1.item()


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Factor that gives the latents a standard deviation of 1."""
    return 1 / vae.encode(pictures, return_dict=False)[0].mean.std().item()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 100) -> torch.Tensor:
    """Scaled latents, (N, 4, 8, 8)."""
    parts = [vae.encode(part, return_dict=False)[0].mean for part in pictures.split(batch)]
    return torch.cat(parts) * vae.config["scaling_factor"]
