"""How much a training writes: told before it begins, from the headers of the model's files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lib_lora.core.files import map_checkpoint
from lib_lora.train.data.options import LATENT_STEP

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lib_lora.core.layers import LayerRef
    from lib_lora.train.data.dataset import Dataset
    from lib_lora.train.network_options import NetworkOptions
    from lib_lora.train.options import TrainOptions

_TEXT = (".self_attn.", ".mlp.")
_TRANSFORMERS = (".attentions.",)
_CONVOLUTIONAL = (".resnets.", ".downsamplers.", ".upsamplers.")
_READS_TEXT = ".attn2.to_k"
_FLOAT32 = 4
_MOMENTS = 2 * 4
"""Mean and standard deviation of the latents' channels."""
_KEPT = 4
"""Numbers of a state for each that is trained, at most: itself, its average, and two of the optimizer."""
_CHUNK, _WITH_ENDS = 75, 77
"""Tokens of a caption, and with what CLIP puts around them."""


def room_needed(dataset: Dataset, layers: Iterable[LayerRef], options: TrainOptions, steps: int) -> int:
    """Bytes of all that a training of a network writes, at most, without pictures.

    Args:
        dataset: What it is trained on.
        layers: The model's.
        options: What is done.
        steps: Of the optimizer.
    """
    layers = list(layers)
    width = 1 if options.output.save_precision == "float" else 0.5
    states = options.output.save_last_n_states + 1  # a new one is whole before an old one goes
    results = 1 + _results(dataset, options, steps)  # the last one is copied to the other LoRAs
    numbers = trained_numbers(layers, options.network) * (results * width + states * _KEPT)
    return int(numbers * _FLOAT32) + _caches(dataset, layers)


def _results(dataset: Dataset, options: TrainOptions, steps: int) -> int:
    """Files of what is learned."""
    epochs = steps * options.optimizer.gradient_accumulation_steps / dataset.order().batches_per_epoch
    per_steps, per_epochs = options.output.save_every_n_steps, options.output.save_every_n_epochs
    return 1 + int(steps / per_steps if per_steps else 0) + int(epochs / per_epochs if per_epochs else 0)


def trained_numbers(layers: Iterable[LayerRef], options: NetworkOptions) -> int:
    """Elements of a network for these layers, at most: as if all blocks had the largest rank of one of them.

    Raises:
        FileError: If the ranks are those of a file, and it can not be read.
    """
    if options.network_weights and options.dim_from_weights:
        return sum(math.prod(info.shape) for info in map_checkpoint(options.network_weights).header.tensors.values())
    rank = max(options.network_dim, *options.block_dims) if options.block_dims else options.network_dim
    wide = max(options.conv_dim or 0, *options.conv_block_dims, 0)
    chosen = [layer.shape for layer in layers if _is_trained(layer, options, wide=wide > 0)]
    return sum((wide if math.prod(shape[2:]) > 1 else rank) * (shape[0] + math.prod(shape[1:])) for shape in chosen)


def _is_trained(layer: LayerRef, options: NetworkOptions, *, wide: bool) -> bool:
    """As the network chooses them, by the names of the blocks that they are in."""
    if layer.component == "unet":
        kinds = () if options.network_train_text_encoder_only else _TRANSFORMERS + (_CONVOLUTIONAL if wide else ())
    else:
        kinds = () if options.network_train_unet_only else _TEXT
    return len(layer.shape) > 1 and any(kind in layer.key for kind in kinds)


def _caches(dataset: Dataset, layers: Iterable[LayerRef]) -> int:
    """Bytes of what is encoded once and kept on the disk."""
    options, size = dataset.options, 0
    if options.cache_latents_to_disk:
        pixels = sum(math.prod(one.fit.bucket) * (1 + one.options.flip_aug) for one in dataset.pictures)
        size += pixels // LATENT_STEP**2 * _MOMENTS * _FLOAT32
    if options.cache_text_encoder_outputs_to_disk:
        captions = len(dataset.captions())
        width = next((layer.shape[1] for layer in layers if layer.key.endswith(_READS_TEXT)), 0)
        size += captions * options.max_token_length // _CHUNK * _WITH_ENDS * width * _FLOAT32
    return size
