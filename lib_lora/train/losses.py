"""The loss: mean squared error of what the model predicts, weighed by picture and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lib_lora.train.noise import NoiseSchedule


def sample_losses(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each picture, (N,) float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weights(schedule: NoiseSchedule, times: Tensor, gamma: float) -> Tensor:
    """min(SNR, γ) / SNR for noise, min(SNR, γ) / (SNR + 1) for v; (N,) float32.

    Source: Hang et al. 2023, https://arxiv.org/abs/2303.09556. Where nothing of the picture is left (SNR 0) the first
    is 1, its limit.
    """
    snr = schedule.snr(times)
    if schedule.prediction == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1)
