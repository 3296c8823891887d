"""The loss: how far off a prediction is, and what each time counts.

Source: conditional_loss and get_huber_threshold_if_needed of kohya's sd-scripts (library/train_util.py),
post_process_loss (train_network.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from torch import Tensor

    from lib_lora.train.noise import NoiseSchedule
    from lib_lora.train.settings import LossOptions

LARGEST_SNR = 1000.0
"""What is weighed by 1 / √SNR or SNR / (SNR + 1) counts a larger one as this: at the first times it is almost ∞."""


def check_weights(schedule: NoiseSchedule, options: LossOptions) -> None:
    """Refuse weights that are for models of the other prediction, or that are infinite.

    Raises:
        JobError: If there is one.
    """
    predicts_noise = schedule.prediction == "epsilon"
    if options.scale_v_pred_loss_like_noise_pred and predicts_noise:
        raise JobError("scale_v_pred_loss_like_noise_pred is for models that predict v, and this one predicts noise")
    if options.v_pred_like_loss is not None and not predicts_noise:
        raise JobError("v_pred_like_loss is for models that predict noise, and this one predicts v")
    above = options.v_pred_like_loss is not None or options.debiased_estimation_loss
    if above and predicts_noise and options.zero_terminal_snr and options.max_timestep == len(schedule.alphas):
        raise JobError(
            "with zero_terminal_snr nothing of the picture is left at the last time, which debiased_estimation_loss "
            f"or v_pred_like_loss makes infinite; leave one of both out, or set max_timestep {options.max_timestep - 1}"
        )


def sample_losses(predicted: Tensor, target: Tensor, kind: str = "l2", borders: Tensor | None = None) -> Tensor:
    """Mean loss of each picture, (N,) float32.

    Args:
        predicted: (N, C, H, W).
        target: As `predicted`.
        kind: As `LossOptions.loss_type`.
        borders: (N,), of huber and smooth_l1: ``2c (√(d² + c²) - c)``, which smooth_l1 divides by c.
    """
    off = predicted.float() - target.float()
    return _measured(off, kind, borders).flatten(1).mean(1)


def _measured(off: Tensor, kind: str, borders: Tensor | None) -> Tensor:
    if borders is None:
        return off.abs() if kind == "l1" else off.square()
    border = borders.reshape(-1, 1, 1, 1)
    smooth = 2 * ((off.square() + border.square()).sqrt() - border)
    return border * smooth if kind == "huber" else smooth


def huber_borders(schedule: NoiseSchedule, times: Tensor, options: LossOptions) -> Tensor | None:
    """Where huber and smooth_l1 change from squares, (N,) float32; None for other losses."""
    if options.loss_type not in ("huber", "smooth_l1"):
        return None
    if options.huber_schedule == "constant":
        return torch.full(times.shape, options.huber_c * options.huber_scale, device=times.device)
    if options.huber_schedule == "exponential":
        return torch.exp(math.log(options.huber_c) / len(schedule.alphas) * times) * options.huber_scale
    sigmas = schedule.snr(times).rsqrt()
    return (1 - options.huber_c) / (1 + sigmas) ** 2 + options.huber_c


def time_weights(schedule: NoiseSchedule, times: Tensor, options: LossOptions) -> Tensor:
    """What each picture's time counts, (N,) float32."""
    weights = torch.ones(times.shape, device=times.device)
    if options.min_snr_gamma:
        weights = weights * min_snr_weights(schedule, times, options.min_snr_gamma)
    snr = schedule.snr(times).clamp(max=LARGEST_SNR)
    if options.scale_v_pred_loss_like_noise_pred:
        weights = weights * snr / (snr + 1)
    if options.v_pred_like_loss is not None:
        weights = weights * (1 + options.v_pred_like_loss * (snr + 1) / snr)
    if options.debiased_estimation_loss:
        weights = weights * (snr.rsqrt() if schedule.prediction == "epsilon" else 1 / (snr + 1))
    return weights


def min_snr_weights(schedule: NoiseSchedule, times: Tensor, gamma: float) -> Tensor:
    """min(SNR, γ) / SNR for noise, min(SNR, γ) / (SNR + 1) for v; (N,) float32.

    Source: Hang et al. 2023, https://arxiv.org/abs/2303.09556. Where nothing of the picture is left (SNR 0) the first
    is 1, its limit.
    """
    snr = schedule.snr(times)
    if schedule.prediction == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1)
