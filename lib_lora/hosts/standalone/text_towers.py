"""The text encoders of a single-file checkpoint under the names of transformers.

Names and the fused qkv: https://github.com/mlfoundations/open_clip (src/open_clip/transformer.py).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lib_lora.hosts.standalone.families import TextTower

_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OUTSIDE = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_INSIDE = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
)
_FUSED = {"attn.in_proj_weight": "weight", "attn.in_proj_bias": "bias"}


def tower_tensors(tower: TextTower, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one text encoder: name in transformers, with ``text_model.`` → view of the checkpoint's tensor.

    Args:
        tower: Which encoder.
        tensors: The whole checkpoint.
    """
    own = ((name[len(tower.prefix) :], tensors[name]) for name in tensors if name.startswith(tower.prefix))
    convert = _from_clip if tower.layout == "clip" else _from_open_clip
    return {name: tensor for key, value in own for name, tensor in convert(key, value)}


def _from_clip(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The names are transformers' own; those of 2022 lack ``text_model.``."""
    if not name.endswith("position_ids"):  # a constant, stored by old versions, as float16 by some
        yield (name if name.startswith("text_model.") else f"text_model.{name}"), tensor


def _from_open_clip(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    block = _RESBLOCK.fullmatch(name)
    if name in _OUTSIDE:
        yield f"text_model.{_OUTSIDE[name]}", tensor
    elif name == "text_projection":
        yield "text_projection.weight", tensor.T  # open_clip multiplies from the right
    elif block:
        for inner, part in _from_resblock(block[2], tensor):
            yield f"text_model.encoder.layers.{block[1]}.{inner}", part


def _from_resblock(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in _FUSED:
        for projection, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield f"self_attn.{projection}_proj.{_FUSED[name]}", rows
    for theirs, ours in _INSIDE:
        if name.startswith(theirs):
            yield ours + name[len(theirs) :], tensor
