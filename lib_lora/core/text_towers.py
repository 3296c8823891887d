"""Text encoders of single-file checkpoints under the names of transformers, and back.

Names and the fused qkv: https://github.com/mlfoundations/open_clip (src/open_clip/transformer.py).
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import torch

from lib_lora.core.clip_names import CLIP_BLOCKS, OPEN_CLIP, OPEN_CLIP_BLOCKS, OPEN_CLIP_QKV
from lib_lora.core.saving import LazyTensor
from lib_lora.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lib_lora.core.single_file import TextTower

TEXT_MODEL = "text_model."
_RESBLOCK = re.compile(rf"{re.escape(OPEN_CLIP_BLOCKS)}(\d+)\.(.+)")
_LAYER = re.compile(rf"{re.escape(CLIP_BLOCKS)}(\d+)\.(.+)")
_OUTSIDE = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_BACK_OUTSIDE = {ours: theirs for theirs, ours in _OUTSIDE.items()}
_PROJECTION, _OPEN_CLIP_PROJECTION = "text_projection.weight", "text_projection"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_CONSTANT = "position_ids"
"""Stored by old versions of transformers, as float16 by some."""


def tower_tensors(tower: TextTower, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one text encoder: name in transformers, with ``text_model.`` → view of the checkpoint's tensor.

    Args:
        tower: Which encoder.
        tensors: The whole checkpoint.
    """
    own = ((name[len(tower.prefix) :], tensors[name]) for name in tensors if name.startswith(tower.prefix))
    convert = _from_clip if tower.layout == "clip" else _from_open_clip
    return {name: tensor for key, value in own for name, tensor in convert(key, value)}


def original_tensors(tower: TextTower, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | LazyTensor]:
    """Tensors of one text encoder under their names in a checkpoint; the opposite of `tower_tensors`.

    Args:
        tower: Which encoder.
        tensors: By their names in transformers, with ``text_model.`` as in version 4 or without.

    Raises:
        ModelError: If q, k and v of a layer are not all there.
    """
    own = {name.removeprefix(TEXT_MODEL): tensor for name, tensor in tensors.items() if not name.endswith(_CONSTANT)}
    if tower.layout == "clip":
        return {f"{tower.prefix}{TEXT_MODEL}{name}": tensor for name, tensor in own.items()}
    return {f"{tower.prefix}{name}": tensor for name, tensor in _to_open_clip(own)}


def _from_clip(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The names are transformers' own; those of 2022 lack ``text_model.``."""
    if not name.endswith(_CONSTANT):
        yield (name if name.startswith(TEXT_MODEL) else f"{TEXT_MODEL}{name}"), tensor


def _from_open_clip(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    block = _RESBLOCK.fullmatch(name)
    if name in _OUTSIDE:
        yield f"{TEXT_MODEL}{_OUTSIDE[name]}", tensor
    elif name == _OPEN_CLIP_PROJECTION:
        yield _PROJECTION, tensor.T  # open_clip multiplies from the right
    elif block:
        for inner, part in _from_resblock(block[2], tensor):
            yield f"{TEXT_MODEL}{CLIP_BLOCKS}{block[1]}.{inner}", part


def _from_resblock(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name.startswith(OPEN_CLIP_QKV):
        kind = name.removeprefix(f"{OPEN_CLIP_QKV}_")
        yield from ((f"{path}.{kind}", rows) for path, rows in zip(_QKV, tensor.chunk(3), strict=True))
    for theirs, ours in OPEN_CLIP:
        if name.startswith(f"{theirs}."):
            yield ours + name[len(theirs) :], tensor


def _to_open_clip(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | LazyTensor]]:
    for name, tensor in tensors.items():
        layer = _LAYER.fullmatch(name)
        if name in _BACK_OUTSIDE:
            yield _BACK_OUTSIDE[name], tensor
        elif name == _PROJECTION:
            yield _OPEN_CLIP_PROJECTION, tensor.T
        elif layer:
            path, _, kind = layer[2].rpartition(".")
            block = f"{OPEN_CLIP_BLOCKS}{layer[1]}"
            if path == _QKV[0]:
                names = [f"{CLIP_BLOCKS}{layer[1]}.{part}.{kind}" for part in _QKV]
                yield f"{block}.{OPEN_CLIP_QKV}_{kind}", _stacked(names, tensors)
            for theirs, ours in OPEN_CLIP:
                if path == ours:
                    yield f"{block}.{theirs}.{kind}", tensor


def _stacked(names: list[str], tensors: Mapping[str, Tensor]) -> LazyTensor:
    if missing := [name for name in names if name not in tensors]:
        raise ModelError(f"the text encoder lacks {missing[0]}, the model is not complete")
    parts = [tensors[name] for name in names]
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return LazyTensor(parts[0].dtype, shape, partial(torch.cat, parts))
