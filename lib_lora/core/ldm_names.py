"""Names of a UNet's layers in diffusers and in LDM (also sgm, SDXL's single files), read from the names present.

Source: the two libraries' own module trees, https://github.com/huggingface/diffusers (UNet2DConditionModel) and
https://github.com/CompVis/latent-diffusion (openaimodel.py).
"""

from __future__ import annotations

from itertools import count, takewhile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Set

_OUTSIDE = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
_MIDDLE_RESNETS = (("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2"))
_MIDDLE_ATTENTION = ("mid_block.attentions.0", "middle_block.1")
_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


class _Level(NamedTuple):
    """The blocks of one resolution: for each residual block whether attention follows, and whether it ends resized."""

    attentions: tuple[bool, ...]
    resized: bool


def diffusers_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """Diffusers path → LDM path of the parts of a UNet, for a UNet whose layers are `names` in diffusers' spelling.

    A residual block's layers are listed one by one; a transformer is one entry, inside it both spell alike.
    """
    parts = _parts(names)
    return dict(_pairs(_diffusers_levels(parts, "down"), _diffusers_levels(parts, "up")))


def ldm_to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """LDM path → diffusers path, for a UNet whose layers are `names` in LDM's spelling."""
    parts = _parts(names)
    pairs = _pairs(_ldm_levels(parts, "input"), _ldm_levels(parts, "output"))
    return {ldm: diffusers for diffusers, ldm in pairs}


def translate(path: str, prefixes: Mapping[str, str]) -> str | None:
    """`path` with the longest of its `prefixes` replaced, or None if it has none."""
    head, tail = path, ""
    while head:
        if head in prefixes:
            return prefixes[head] + tail
        head, dot, last = head.rpartition(".")
        tail = f"{dot}{last}{tail}" if dot else ""
    return None


def _parts(names: Iterable[str]) -> Set[str]:
    """Every prefix of every name, cut at dots."""
    parts: set[str] = set()
    for name in names:
        part = name
        while part and part not in parts:
            parts.add(part)
            part = part.rpartition(".")[0]
    return parts


def _diffusers_levels(parts: Set[str], side: str) -> list[_Level]:
    levels: list[_Level] = []
    for level in takewhile(lambda level: f"{side}_blocks.{level}" in parts, count()):
        block = f"{side}_blocks.{level}"
        resnets = takewhile(lambda resnet, block=block: f"{block}.resnets.{resnet}" in parts, count())
        attentions = tuple(f"{block}.attentions.{resnet}" in parts for resnet in resnets)
        levels.append(_Level(attentions, f"{block}.{side}samplers" in parts))
    return levels


def _ldm_levels(parts: Set[str], side: str) -> list[_Level]:
    levels: list[_Level] = []
    attentions: list[bool] = []
    for number in takewhile(lambda number: f"{side}_blocks.{number}" in parts, count()):
        block = f"{side}_blocks.{number}"
        resized = not parts.isdisjoint((f"{block}.0.op", f"{block}.1.conv", f"{block}.2.conv"))
        if f"{block}.0.in_layers" in parts:
            attentions.append(f"{block}.1.proj_in" in parts)
        if resized:
            levels.append(_Level(tuple(attentions), resized=True))
            attentions = []
    return [*levels, _Level(tuple(attentions), resized=False)]


def _pairs(down: Iterable[_Level], up: Iterable[_Level]) -> Iterator[tuple[str, str]]:
    yield from _OUTSIDE
    yield _MIDDLE_ATTENTION
    for diffusers, ldm in _MIDDLE_RESNETS:
        yield from _resnet_pairs(diffusers, ldm)
    yield from _down_pairs(down)
    yield from _up_pairs(up)


def _down_pairs(levels: Iterable[_Level]) -> Iterator[tuple[str, str]]:
    numbers = count(1)
    for level, (attentions, resized) in enumerate(levels):
        block = f"down_blocks.{level}"
        for layer, attention in enumerate(attentions):
            yield from _layer_pairs(block, layer, f"input_blocks.{next(numbers)}", attention=attention)
        if resized:
            yield f"{block}.downsamplers.0.conv", f"input_blocks.{next(numbers)}.0.op"


def _up_pairs(levels: Iterable[_Level]) -> Iterator[tuple[str, str]]:
    numbers = count()
    for level, (attentions, resized) in enumerate(levels):
        block, ldm = f"up_blocks.{level}", ""
        for layer, attention in enumerate(attentions):
            ldm = f"output_blocks.{next(numbers)}"
            yield from _layer_pairs(block, layer, ldm, attention=attention)
        if resized and attentions:
            yield f"{block}.upsamplers.0.conv", f"{ldm}.{2 if attentions[-1] else 1}.conv"


def _layer_pairs(block: str, layer: int, ldm: str, *, attention: bool) -> Iterator[tuple[str, str]]:
    yield from _resnet_pairs(f"{block}.resnets.{layer}", f"{ldm}.0")
    if attention:
        yield f"{block}.attentions.{layer}", f"{ldm}.1"


def _resnet_pairs(diffusers: str, ldm: str) -> Iterator[tuple[str, str]]:
    return ((f"{diffusers}.{ours}", f"{ldm}.{theirs}") for ours, theirs in _RESNET)
