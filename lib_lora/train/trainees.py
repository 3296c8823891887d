"""What is trained: a network beside the model, or the model's UNet itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from lib_lora.train.create_network import create_network
from lib_lora.train.groups import TEXT_GROUP
from lib_lora.train.metadata import training_metadata
from lib_lora.train.network_file import network_tensors, save_network
from lib_lora.train.tuned_unet import TunedUNet

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from lib_lora.train.metadata import Reached, TrainingFacts
    from lib_lora.train.model import TrainModel
    from lib_lora.train.network import TrainNetwork
    from lib_lora.train.options import TrainOptions

SAVED = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Trainee(Protocol):
    """What is trained.

    Attributes:
        trains_text: Whether gradients go through the text encoders.
        notes: Sentences for the user.
    """

    trains_text: bool
    notes: tuple[str, ...]

    @property
    def module(self) -> nn.Module:
        """Its parameters and buffers are what a checkpoint keeps."""
        ...

    @property
    def network(self) -> TrainNetwork | None:
        """`module` if it is attached to the model, None if it is a part of it."""
        ...

    def groups(self) -> list[dict[str, Any]]:
        """Parameters and rates for the optimizer."""
        ...

    def after_step(self) -> None:
        """What is done to the parameters after they were moved."""
        ...

    def paths(self, stem: Path) -> tuple[Path, ...]:
        """What `save` writes under this name without a suffix."""
        ...

    def save(self, stem: Path, facts: TrainingFacts, reached: Reached) -> None:
        """Write it; what is there is replaced."""
        ...

    def release(self) -> None:
        """Leave the model to others."""
        ...


class NetworkTrainee:
    """A network on the frozen model."""

    def __init__(self, model: TrainModel, options: TrainOptions) -> None:
        model.unet.requires_grad_(False)
        for encoder in model.text_encoders:
            encoder.requires_grad_(False)
        network = create_network(model.unet, model.text_encoders, options.network)
        network.eval()  # captions may be encoded before the training begins
        self.module = self.network = network
        self.notes = self.network.notes
        self._options = options
        self.trains_text = any(group["name"].startswith(TEXT_GROUP) for group in self.groups())
        self.network.attach()

    def groups(self) -> list[dict[str, Any]]:
        """Of kohya's names."""
        rates = self._options.optimizer
        return self.network.groups(rates.unet_lr, rates.text_encoder_lr, rates.learning_rate)

    def after_step(self) -> None:
        """Shorten what is too long."""
        if self._options.network.scale_weight_norms is not None:
            self.network.scale_weight_norms(self._options.network.scale_weight_norms)

    def paths(self, stem: Path) -> tuple[Path, ...]:
        """One LoRA file."""
        return (stem.with_name(f"{stem.name}.safetensors"),)

    def save(self, stem: Path, facts: TrainingFacts, reached: Reached) -> None:
        """Write it, with kohya's metadata.

        Raises:
            NonFiniteError: If a weight is NaN, or too large for the type it is saved in.
            OutputError: If it can not be written.
        """
        output = self._options.output
        metadata = training_metadata(self.network, facts, reached, minimum=output.no_metadata)
        tensors = network_tensors(self.network, SAVED[output.save_precision])
        save_network(self.paths(stem)[0], tensors, metadata, overwrite=True)

    def release(self) -> None:
        """The model computes as before."""
        self.network.release()


def make_trainee(model: TrainModel, options: TrainOptions) -> Trainee:
    """As the options say."""
    if options.model.full:
        return TunedUNet(model, options, SAVED[options.output.save_precision])
    return NetworkTrainee(model, options)
