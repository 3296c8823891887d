"""Full fine-tuning: the UNet itself is trained, and saved as a folder of diffusers and as a checkpoint file."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.replacing import making_folder
from lib_lora.core.saving import LazyTensor, save_bytes, save_tensors
from lib_lora.tools.convert_checkpoint import to_single

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from lib_lora.train.metadata import Reached, TrainingFacts
    from lib_lora.train.model import TrainModel
    from lib_lora.train.network_options import NetworkOptions
    from lib_lora.train.options import TrainOptions

_FORMAT = {"format": "pt"}
"""Without it, transformers does not load a file."""
_TEXT_NAMES = ("text_model.", "text_projection.")


class TunedUNet:
    """The UNet of a model, all of it, in float32.

    Attributes:
        module: The UNet.
        network: None: nothing is attached to it.
        trains_text: False.
        notes: Which options of a network were given.
    """

    network = None
    trains_text = False

    def __init__(self, model: TrainModel, options: TrainOptions, dtype: torch.dtype) -> None:
        """Let gradients flow.

        Args:
            model: Whose UNet it is; its other parts are saved with it.
            options: Rates.
            dtype: Of the saved numbers.
        """
        for encoder in model.text_encoders:
            encoder.requires_grad_(False)
        if model.unet.dtype != torch.float32:
            model.unet.float()
        self.module: nn.Module = model.unet.requires_grad_(True)
        self._model, self._options, self._dtype = model, options, dtype
        self.notes = tuple(_without_effect(options.network))
        self._index, self._scheduler = model.pipe.to_json_string(), model.pipe.scheduler  # samples put in others

    def groups(self) -> list[dict[str, Any]]:
        """All of it at one rate."""
        rates = self._options.optimizer
        rate = rates.learning_rate if rates.unet_lr is None else rates.unet_lr
        return [{"name": "unet", "lr": rate, "params": list(self.module.parameters())}]

    def after_step(self) -> None:
        """Nothing."""

    def paths(self, stem: Path) -> tuple[Path, ...]:
        """A folder and a file."""
        return stem, stem.with_name(f"{stem.name}.safetensors")

    def save(self, stem: Path, facts: TrainingFacts, reached: Reached) -> None:
        """Write both; of a folder that is there, each file is replaced.

        Raises:
            OutputError: If one can not be written.
        """
        folder, file = self.paths(stem)
        if folder.is_dir():
            self._write(folder)
        else:
            with making_folder(folder) as made:
                self._write(made)
        to_single(folder, file, overwrite=True)

    def release(self) -> None:
        """Gradients flow no more."""
        self.module.requires_grad_(False)
        self.module.zero_grad()

    def _write(self, folder: Path) -> None:
        """All parts of the pipeline, as diffusers' save_pretrained has them."""
        model = self._model
        weights = "diffusion_pytorch_model.safetensors"
        self._write_part(folder / "unet", model.unet.to_json_string(), weights, self.module.state_dict())
        self._write_part(folder / "vae", model.vae.to_json_string(), weights, model.vae.state_dict())
        for number, encoder in enumerate(model.text_encoders, 1):
            part = folder / ("text_encoder" if number == 1 else f"text_encoder_{number}")
            tensors = {_text_name(name): tensor for name, tensor in encoder.state_dict().items()}
            self._write_part(part, _text_config(encoder), "model.safetensors", tensors)
        for number, tokenizer in enumerate(model.tokenizers, 1):
            tokenizer.save_pretrained(folder / ("tokenizer" if number == 1 else f"tokenizer_{number}"))
        self._scheduler.save_pretrained(folder / "scheduler")
        save_bytes(folder / "model_index.json", self._index.encode(), overwrite=True)

    def _write_part(self, folder: Path, config: str, name: str, tensors: Mapping[str, Tensor]) -> None:
        folder.mkdir(exist_ok=True)
        save_tensors(folder / name, {key: self._saved(one) for key, one in tensors.items()}, _FORMAT, overwrite=True)
        save_bytes(folder / "config.json", config.encode(), overwrite=True)

    def _saved(self, tensor: Tensor) -> Tensor | LazyTensor:
        if not tensor.is_floating_point():
            return tensor
        return LazyTensor(self._dtype, tuple(tensor.shape), lambda: tensor.detach().to("cpu", self._dtype))


def _without_effect(options: NetworkOptions) -> Iterator[str]:
    """A sentence, if some are not as by default."""
    if given := [field.name for field in fields(options) if getattr(options, field.name) != field.default]:
        yield f"no network is trained but the whole UNet: without effect are {', '.join(given)}"


def _text_config(encoder: Any) -> str:
    """With the class that it is, which a model made in memory does not say."""
    return json.dumps(json.loads(encoder.config.to_json_string()) | {"architectures": [type(encoder).__name__]})


def _text_name(name: str) -> str:
    """The name in files: transformers 5 drops this prefix in memory; files have it, and both 4 and 5 read it."""
    return name if name.startswith(_TEXT_NAMES) else f"text_model.{name}"
