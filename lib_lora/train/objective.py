"""From a batch to the loss: what Accelerate wraps, so that gradients of all that is trained are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lib_lora.train.losses import check_weights, huber_borders, sample_losses, time_weights
from lib_lora.train.settings import LossOptions
from lib_lora.train.text import tokens_to_states

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.train.noise import NoiseSchedule

PLAIN = LossOptions()


class Objective(nn.Module):
    """The loss of a model, with a network on it or by itself.

    Attributes:
        schedule: Of the noise, on the device of the model.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoders: Sequence[nn.Module],
        network: nn.Module | None,
        schedule: NoiseSchedule,
        *,
        trains_text: bool = False,
        clip_skip: int | None = None,
        loss: LossOptions = PLAIN,
    ) -> None:
        """Put the parts together.

        Args:
            unet: diffusers' UNet.
            text_encoders: Those that encode in each step; empty where captions are encoded before.
            network: What is attached to them; None if the UNet itself is trained.
            schedule: Of the noise.
            trains_text: Whether gradients go through the text encoders.
            clip_skip: As of `encode`.
            loss: How it is measured and what times count.

        Raises:
            JobError: If that does not go with what the model predicts.
        """
        super().__init__()
        self.unet: Any = unet
        self.text_encoders = nn.ModuleList(text_encoders)
        self.network = network
        self.schedule = schedule
        self._dtype: torch.dtype = self.unet.dtype  # diffusers looks through all parameters for it
        self._trains_text, self._clip_skip, self._loss = trains_text, clip_skip, loss
        check_weights(schedule, loss)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        times: Tensor,
        texts: Mapping[str, Tensor],
        weights: Tensor,
        sizes: Tensor | None = None,
        unasked: Tensor | None = None,
    ) -> Tensor:
        """Mean over the pictures of weight · loss, () float32.

        Args:
            latents: Scaled, (N, C, H, W) float32.
            noise: As `latents`.
            times: (N,) int64.
            texts: As of `tokens_to_states`, or of `captions_to_tokens` where text encoders are parts of this.
            weights: Of the pictures, (N,) float32.
            sizes: SDXL's six numbers of each picture: height and width as it was, top and left of the crop, height and
                width as it is; (N, 6).
            unasked: Noise on the pictures that the model is not to find, as `latents`.
        """
        if self.text_encoders:
            with torch.set_grad_enabled(self._trains_text and torch.is_grad_enabled()):
                texts = tokens_to_states(list(self.text_encoders), texts, self._clip_skip)
        states, dtype = texts["states"], self._dtype
        added = {"text_embeds": texts["pooled"].to(dtype), "time_ids": sizes} if "pooled" in texts else None
        on_pictures = noise if unasked is None else noise + unasked
        noisy = self.schedule.add_noise(latents, on_pictures, times).to(dtype)
        predicted = self.unet(noisy, times, states.to(dtype), added_cond_kwargs=added, return_dict=False)[0]
        target, borders = self.schedule.target(latents, noise, times), huber_borders(self.schedule, times, self._loss)
        losses = sample_losses(predicted, target, self._loss.loss_type, borders) * weights
        return (losses * time_weights(self.schedule, times, self._loss)).mean()
