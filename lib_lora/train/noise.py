"""The noise that is learned: its schedule, and what is drawn for each picture.

What is drawn depends on the seed and on the picture's place in the training alone, so it is the same however pictures
are spread over processes, and after a resume.

Sources: Ho et al. 2020 (https://arxiv.org/abs/2006.11239), Salimans and Ho 2022 (v, https://arxiv.org/abs/2202.00512),
Lin et al. 2023 (zero terminal SNR, https://arxiv.org/abs/2305.08891).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_MIX = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio: neighbouring seeds and places get seeds far apart."""
_SEEDS = 2**63
_USED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = √ᾱ_t · x + √(1 - ᾱ_t) · noise.

    Attributes:
        alphas: ᾱ_t, (T,) float32: the part of the picture's variance that is left at each time.
        prediction: What the model predicts: the noise, or v = √ᾱ_t · noise - √(1 - ᾱ_t) · x.
    """

    alphas: Tensor
    prediction: Literal["epsilon", "v_prediction"]

    @classmethod
    def of_scheduler(
        cls, config: Mapping[str, Any], *, zero_terminal_snr: bool = False, v_prediction: bool | None = None
    ) -> NoiseSchedule:
        """The schedule that a model was made with.

        Args:
            config: Configuration of the scheduler that came with the model, in diffusers' words.
            zero_terminal_snr: Whether betas are rescaled so that nothing of the picture is left at the last time.
            v_prediction: What the model predicts; None for what the configuration says.
        """
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        used: dict[str, Any] = {key: config[key] for key in _USED if config.get(key) is not None}
        scheduler = DDPMScheduler(**used, rescale_betas_zero_snr=zero_terminal_snr)
        said = config.get("prediction_type") == "v_prediction" if v_prediction is None else v_prediction
        return cls(scheduler.alphas_cumprod.float(), "v_prediction" if said else "epsilon")

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same on a device."""
        return replace(self, alphas=self.alphas.to(device))

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t, as `latents` (N, C, H, W) float32."""
        kept, added = self._factors(times)
        return kept * latents + added * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the model should predict, as `latents`."""
        if self.prediction == "epsilon":
            return noise
        kept, added = self._factors(times)
        return kept * noise - added * latents

    def snr(self, times: Tensor) -> Tensor:
        """ᾱ / (1 - ᾱ), (N,) float32."""
        alphas = self.alphas[times]
        return alphas / (1 - alphas)

    def _factors(self, times: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas[times].reshape(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()


class Draws(NamedTuple):
    """What chance gives to the pictures of a batch.

    Attributes:
        noise: Normal, (N, C, H, W) float32.
        times: (N,) int64.
        encoding: Normal, (N, C, H, W) float32: for a sample of the autoencoder's distribution.
    """

    noise: Tensor
    times: Tensor
    encoding: Tensor


def draw(
    seed: int, places: Sequence[int], shape: tuple[int, ...], times: tuple[int, int], noise_offset: float = 0.0
) -> Draws:
    """Noise and times of pictures, on the CPU.

    Args:
        seed: Of the training.
        places: How many pictures were trained before each, in all processes.
        shape: Of one picture's latents, (C, H, W).
        times: First, and first above the last.
        noise_offset: Standard deviation of what is added to each channel as a whole
            (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    drawn = [_draw_one(mixed_seed(seed, place), shape, times, noise_offset) for place in places]
    return Draws(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


def mixed_seed(seed: int, place: int) -> int:
    """One seed of two numbers."""
    return (seed * _MIX + place) % _SEEDS


def _draw_one(
    seed: int, shape: tuple[int, ...], times: tuple[int, int], noise_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=chance)
    time = torch.randint(*times, (), generator=chance)
    encoding = torch.randn(shape, generator=chance)
    if noise_offset:
        noise = noise + noise_offset * torch.randn((shape[0], 1, 1), generator=chance)
    return noise, time, encoding
