"""Networks in files: going on from one, and saving.

Source: what train_network.py of sd-scripts does with ``--network_weights`` and writes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.core.network import load_network
from lib_lora.core.opening import shown
from lib_lora.core.saving import no_progress, save_tensors
from lib_lora.errors import NonFiniteError, TrainError
from lib_lora.tools.metadata import sshs_hashes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.saving import Progress
    from lib_lora.train.adapters import LoraLayer
    from lib_lora.train.network import TrainNetwork
    from lib_lora.train.network_layers import Target, TrainedModel


class WeightsFile:
    """A LoRA file, in any layout, to go on from.

    Attributes:
        layers: Where in the model, and what is there; text encoders first.

    Raises:
        FileError, NamingError, AdapterError, NonFiniteError: If the file can not be read.
        TrainError: If it holds something else than plain LoRA layers, or does not fit the model.
    """

    def __init__(self, path: Path, model: TrainedModel) -> None:
        self._name = shown(path)
        found = [self._find(layer, adapter, model) for layer, adapter in load_network(path).adapters.items()]
        names = Counter(target.name for target, _ in found)
        if twice := [name for name, count in names.items() if count > 1]:
            raise TrainError(f"{self._name} holds {twice[0]} under two names; which one is meant can not be told")
        trained = [one for one in found if one[0].component in model.components]
        self.layers = sorted(trained, key=lambda one: one[0].component == "unet")
        self._untrained = len(found) - len(trained)

    def _find(self, layer: str, adapter: WeightAdapter, model: TrainedModel) -> tuple[Target, LoraAdapter]:
        """Where in the model a layer of the file is."""
        if not isinstance(adapter, LoraAdapter) or adapter.core is not None:
            raise TrainError(f"{self._name}: {layer} is {adapter.algorithm}; only plain LoRA layers can be trained on")
        target = model.find(layer)
        if target is None or not adapter.fits(target.shape):
            shape = adapter.shape_text()
            raise TrainError(f"{self._name} is not for this model: it has no layer {layer} of shape {shape}")
        return target, adapter

    def load(self, layers: Mapping[str, LoraLayer]) -> Iterator[str]:
        """Give its effect to layers of a network, by name; sentences about what is left out.

        Raises:
            TrainError: If one has another rank, or the file has none of them.
        """
        for target, adapter in self.layers:
            layer = layers.get(target.name)
            if layer is not None and layer.rank != adapter.rank:
                raise TrainError(
                    f"{self._name}: {target.name} has rank {adapter.rank}, the options say {layer.rank}; "
                    "change them, or take ranks from the file with dim_from_weights"
                )
        found = [(layers[target.name], adapter) for target, adapter in self.layers if target.name in layers]
        if not found:
            raise TrainError(f"{self._name} has no layer of those that are trained; a training can not go on from it")
        for layer, adapter in found:
            layer.load(adapter)
        if left := self._untrained + len(self.layers) - len(found):
            yield f"{left} layers of {self._name} are not trained here and left out"
        if len(found) < len(layers):
            yield f"{len(layers) - len(found)} of {len(layers)} layers are not in {self._name} and begin anew"


def network_tensors(network: TrainNetwork, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A copy on the CPU of what is saved, by kohya's keys: ``NAME.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

    Args:
        network: What is trained.
        dtype: Of all tensors; None for what they have.

    Raises:
        NonFiniteError: If a weight is NaN or infinite, or too large for `dtype`.
    """
    tensors = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in network.state_dict().items()}
    if bad := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), ""):
        raise NonFiniteError(
            f"{bad} holds NaN or infinity as {tensors[bad].dtype}, nothing was saved; "
            "the training diverged, lower the learning rate"
        )
    return tensors


def save_network(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Write a LoRA file: whole and verified, or not at all.

    Args:
        path: The file to be.
        tensors: See `network_tensors`.
        metadata: See `training_metadata`; hashes of the tensors are added.
        overwrite: Whether an older file is replaced.
        progress: Told the bytes written.

    Raises:
        OutputError: If it can not be written. An older file is then untouched.
    """
    said = {**metadata, **sshs_hashes(tensors, metadata)}
    save_tensors(path, tensors, said, overwrite=overwrite, progress=progress)
