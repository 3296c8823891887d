"""A model that is trained, and what a training needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lib_lora.core.keymap import KeyMap
from lib_lora.core.models import BaseModel
from lib_lora.errors import JobError
from lib_lora.pipelines import pipeline_components

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lib_lora.tools.metadata import Prediction
    from lib_lora.train.options import TrainOptions


@dataclass(frozen=True)
class TrainModel:
    """A diffusers pipeline of SD1, SD2 or SDXL; its VAE and tokenizers prepare the pictures and captions.

    Attributes:
        pipe: The pipeline. Its weights are on any device, in any type.
        name: For people and for the metadata.
        path: The checkpoint file or the folder that it was loaded from.
        scheduler: Configuration of the scheduler that came with it.
    """

    pipe: Any
    name: str
    path: Path
    scheduler: Mapping[str, Any]

    @property
    def unet(self) -> Any:
        """UNet2DConditionModel."""
        return self.pipe.unet

    @property
    def vae(self) -> Any:
        """AutoencoderKL."""
        return self.pipe.vae

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """One, or SDXL's two."""
        found = (getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        return tuple(encoder for encoder in found if encoder is not None)

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """Of the text encoders."""
        found = (getattr(self.pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
        return tuple(tokenizer for tokenizer in found if tokenizer is not None)

    @property
    def prediction(self) -> Prediction:
        """What the UNet predicts, as its scheduler says."""
        return "v" if self.scheduler.get("prediction_type") == "v_prediction" else "epsilon"

    @cached_property
    def family(self) -> BaseModel:
        """SD1 stands for one that is not known, such as a small model."""
        family = KeyMap.from_modules(pipeline_components(self.pipe)).base_model
        return BaseModel.SD1 if family is BaseModel.UNKNOWN else family

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet reads the pooled text and sizes too."""
        return len(self.text_encoders) > 1


def check_model(model: TrainModel, options: TrainOptions) -> None:
    """Refuse a model that can not be trained here, and options that ask for what it has not.

    Raises:
        JobError: If it paints within masks, or has fewer layers or times than the options name.
    """
    read, given = model.unet.config.in_channels, model.vae.config.latent_channels
    if read != given:
        raise JobError(
            f"{model.name} paints within masks: it reads {read} channels, where a picture has {given}. "
            "Train on the model that it was made from"
        )
    layers, clip_skip = model.text_encoders[0].config.num_hidden_layers, options.model.clip_skip or 1
    if clip_skip > layers:
        raise JobError(f"clip_skip {clip_skip} is no layer of {model.name}, whose text encoder has {layers}")
    times, last = model.scheduler.get("num_train_timesteps", 1000), options.loss.max_timestep
    if last > times:
        raise JobError(f"max_timestep {last} is above the {times} times of {model.name}")
