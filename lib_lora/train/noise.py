"""The noise that is learned: its schedule, and what is drawn for each picture.

What is drawn depends on the seed and on the picture's place in the training alone, so it is the same however pictures
are spread over processes, and after a resume.

Sources: Ho et al. 2020 (https://arxiv.org/abs/2006.11239), Salimans and Ho 2022 (v, https://arxiv.org/abs/2202.00512),
Lin et al. 2023 (zero terminal SNR, https://arxiv.org/abs/2305.08891).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import interpolate

from lib_lora.train.settings import NoiseOptions

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
            zero_terminal_snr: Whether betas are rescaled so that nothing of the picture is left at the last time, even
                if the configuration does not say so.
            v_prediction: What the model predicts; None for what the configuration says.
        """
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        used: dict[str, Any] = {key: config[key] for key in _USED if config.get(key) is not None}
        rescaled = zero_terminal_snr or bool(config.get("rescale_betas_zero_snr"))
        scheduler = DDPMScheduler(**used, rescale_betas_zero_snr=rescaled)
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


@dataclass(frozen=True)
class Draws:
    """What chance gives to the pictures of a batch; None for what nothing asks for.

    Attributes:
        noise: Normal, (N, C, H, W) float32.
        times: (N,) int64.
        encoding: Normal, (N, C, H, W) float32: for a sample of the autoencoder's distribution.
        shift: Normal, (N, C, 1, 1) float32, of `noise_offset`.
        shift_strength: From 0 to 1, (N, 1, 1, 1) float32.
        coarse: Noise of coarser sizes, (N, C, H, W) float32.
        unasked: Noise on the pictures that the model is not to find, (N, C, H, W) float32.
    """

    noise: Tensor
    times: Tensor
    encoding: Tensor
    shift: Tensor | None = None
    shift_strength: Tensor | None = None
    coarse: Tensor | None = None
    unasked: Tensor | None = None

    def to(self, device: torch.device) -> Draws:
        """The same on a device."""
        return Draws(**{name: part.to(device) for name, part in vars(self).items() if part is not None})


PLAIN = NoiseOptions()


def draw(
    seed: int, places: Sequence[int], shape: tuple[int, ...], times: tuple[int, int], options: NoiseOptions = PLAIN
) -> Draws:
    """Noise and times of pictures, on the CPU.

    Args:
        seed: Of the training.
        places: How many pictures were trained before each, in all processes.
        shape: Of one picture's latents, (C, H, W).
        times: First, and first above the last.
        options: What else is drawn.
    """
    drawn = [_draw_one(mixed_seed(seed, place), shape, times, options) for place in places]
    return Draws(**{name: torch.stack([one[name] for one in drawn]) for name in drawn[0]})


def learned_noise(drawn: Draws, latents: Tensor, options: NoiseOptions) -> Tensor:
    """The noise that the model is to find, (N, C, H, W) float32.

    As of kohya's sd-scripts (apply_noise_offset and pyramid_noise_like in library/custom_train_functions.py), but what
    they draw or measure once for a batch is here each picture's own.

    Sources: https://www.crosslabs.org/blog/diffusion-with-offset-noise; multi-resolution noise,
    https://wandb.ai/johnowhitaker/multires_noise/reports/Multi-Resolution-Noise-for-Diffusion-Model-Training--VmlldzozNjYyOTU2
    """
    noise = drawn.noise
    if drawn.shift is not None:
        strength = options.noise_offset * (1.0 if drawn.shift_strength is None else drawn.shift_strength)
        if options.adaptive_noise_scale is not None:
            means = latents.mean((2, 3), keepdim=True).abs()
            strength = (strength + options.adaptive_noise_scale * means).clamp(min=0)
        noise = noise + strength * drawn.shift
    if drawn.coarse is not None:
        noise = noise + drawn.coarse
        noise = noise / noise.flatten(1).std(1).reshape(-1, 1, 1, 1)
    return noise


def mixed_seed(seed: int, place: int) -> int:
    """One seed of two numbers."""
    return (seed * _MIX + place) % _SEEDS


def _draw_one(seed: int, shape: tuple[int, ...], times: tuple[int, int], options: NoiseOptions) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    drawn = {
        "noise": torch.randn(shape, generator=chance),
        "times": torch.randint(*times, (), generator=chance),
        "encoding": torch.randn(shape, generator=chance),
    }
    if options.noise_offset:
        drawn["shift"] = torch.randn((shape[0], 1, 1), generator=chance)
        if options.noise_offset_random_strength:
            drawn["shift_strength"] = torch.rand((1, 1, 1), generator=chance)
    if options.multires_noise_iterations:
        drawn["coarse"] = _coarse(shape, options.multires_noise_iterations, options.multires_noise_discount, chance)
    if options.ip_noise_gamma:
        part = torch.rand((), generator=chance) if options.ip_noise_gamma_random_strength else 1.0
        drawn["unasked"] = part * options.ip_noise_gamma * torch.randn(shape, generator=chance)
    return drawn


def _coarse(shape: tuple[int, ...], sizes: int, discount: float, chance: torch.Generator) -> Tensor:
    """Noise of sizes that shrink by 2 to 4 each time, enlarged and added, each less; (C, H, W) float32."""
    channels, *full = shape
    total = torch.zeros(shape)
    for index in range(sizes):
        shrunk = (2 + 2 * torch.rand((), generator=chance).item()) ** index
        size = [max(1, int(side / shrunk)) for side in full]
        small = torch.randn((1, channels, *size), generator=chance)
        total += interpolate(small, full, mode="bilinear")[0] * discount**index
        if 1 in size:
            break
    return total
