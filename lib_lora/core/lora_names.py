"""A layer's name in a LoRA file → its dotted path, and its names in files of kohya and of PEFT: SD1, SD2, SDXL.

Kohya's flat names can not be turned back by a rule, for names hold underscores themselves. Here they are looked up
among all that these models' layers can be named; what is not found there is refused, never guessed.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from lib_lora.core.clip_names import CLIP_BLOCKS, OPEN_CLIP, OPEN_CLIP_BLOCKS, OPEN_CLIP_OUTSIDE
from lib_lora.core.ldm_names import diffusers_to_ldm, translate
from lib_lora.core.models import BaseModel
from lib_lora.core.naming import CONTROLNETS, PIPELINE_PARTS, layer_name
from lib_lora.errors import NamingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_CONTROLNETS = {name: f"lora_{name}" for name in CONTROLNETS}
_KOHYA_COMPONENTS = {
    BaseModel.SD1: {"unet": "lora_unet", "te1": "lora_te", **_CONTROLNETS},
    BaseModel.SD2: {"unet": "lora_unet", "te1": "lora_te", **_CONTROLNETS},
    BaseModel.SDXL: {"unet": "lora_unet", "te1": "lora_te1", "te2": "lora_te2", **_CONTROLNETS},
}
FAMILIES = tuple(_KOHYA_COMPONENTS)
"""The families whose names are known."""

_SD_LEVELS = ((True, True, True, False), (False, True, True, True))
_LEVELS = {
    BaseModel.SD1: _SD_LEVELS,
    BaseModel.SD2: _SD_LEVELS,
    BaseModel.SDXL: ((False, True, True), (True, True, False)),
}
"""Which levels of the UNet have attention, on the way down and on the way up."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.#")
_TRANSFORMER_BLOCK = (
    *("norm1", "norm2", "norm3", "ff.net.#", "ff.net.#.proj"),
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in _ATTENTION),
)
_TRANSFORMER = ("norm", "proj_in", "proj_out", *(f"transformer_blocks.#.{part}" for part in _TRANSFORMER_BLOCK))
_RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
_LDM_RESNET = ("in_layers.#", "emb_layers.#", "out_layers.#", "skip_connection")
_CLIP_LAYER = (
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
)

# "#" stands for a number.
_UNET_PATHS = (
    *("conv_in", "conv_out", "conv_norm_out", "time_embedding.linear_#", "add_embedding.linear_#"),
    *(f"{side}_blocks.#.{side}samplers.#.conv" for side in ("down", "up")),
    *(f"{block}.resnets.#.{part}" for block in ("down_blocks.#", "mid_block", "up_blocks.#") for part in _RESNET),
    *(
        f"{block}.attentions.#.{part}"
        for block in ("down_blocks.#", "mid_block", "up_blocks.#")
        for part in _TRANSFORMER
    ),
)
_LDM_PATHS = (
    *("time_embed.#", "label_emb.#.#", "out.#", "input_blocks.#.#", "input_blocks.#.#.op", "output_blocks.#.#.conv"),
    *(
        f"{block}.{part}"
        for block in ("input_blocks.#.#", "middle_block.#", "output_blocks.#.#")
        for part in (*_LDM_RESNET, *_TRANSFORMER)
    ),
)
_CLIP_PATHS = (
    *("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm", "text_projection"),
    *(f"{CLIP_BLOCKS}#.{part}" for part in _CLIP_LAYER),
)
_OPEN_CLIP_PATHS = {
    **dict(OPEN_CLIP_OUTSIDE),
    **{f"{OPEN_CLIP_BLOCKS}#.{theirs}": f"{CLIP_BLOCKS}#.{ours}" for theirs, ours in OPEN_CLIP},
}
_OUTSIDE_TEXT_MODEL = ("text_projection",)

_NUMBER = re.compile(r"(?<=_)(?:0|[1-9][0-9]*)(?=_|$)")


def dotted_name(layer: str, family: BaseModel) -> str:
    """Canonical name with dots, as `LayerRef.key`: ``unet.down_blocks.0.attentions.0.proj_in``.

    Args:
        layer: Name as `naming.split_key` gives it, ``component:flat_path``, in diffusers', LDM's, transformers' or
            open_clip's spelling; or `LayerRef.key`. Of a weight, not a bias.
        family: The family it belongs to; one of `FAMILIES`.

    Raises:
        NamingError: If models of this family have no layer of that name, or the family's names are not known.
    """
    component, path = _split(layer, family)
    return f"{component}.{path}"


def kohya_name(layer: str, family: BaseModel) -> str:
    """What kohya's keys of a layer begin with, without the dot: ``lora_unet_down_blocks_0_attentions_0_proj_in``.

    The UNet's layers are spelled as in diffusers for SD1 and SD2, and as in sgm for SDXL.

    Args:
        layer: See `dotted_name`.
        family: See `dotted_name`.

    Raises:
        NamingError: See `dotted_name`.
    """
    component, path = _split(layer, family)
    if component == "unet" and family is BaseModel.SDXL:
        ldm = translate(path, _ldm_paths(family))
        if ldm is None:
            raise _unknown(layer, family)
        path = ldm
    return f"{_KOHYA_COMPONENTS[family][component]}_{path.replace('.', '_')}"


def peft_name(layer: str, family: BaseModel) -> str:
    """What diffusers' keys of a layer begin with, without the dot: ``unet.down_blocks.0.attentions.0.proj_in``.

    Args:
        layer: See `dotted_name`.
        family: See `dotted_name`.

    Raises:
        NamingError: See `dotted_name`.
    """
    component, path = _split(layer, family)
    return f"{PIPELINE_PARTS[component]}.{path}"


def original_name(layer: str, family: BaseModel) -> str:
    """Dotted path in its component as `LayerRef.original`: ``input_blocks.1.1.proj_in``, or as in transformers.

    Args:
        layer: See `dotted_name`.
        family: See `dotted_name`.

    Raises:
        NamingError: See `dotted_name`.
    """
    component, path = _split(layer, family)
    return (translate(path, _ldm_paths(family)) if component == "unet" else None) or path


def _split(layer: str, family: BaseModel) -> tuple[str, str]:
    """Component, and path in diffusers' or transformers' spelling."""
    if family not in FAMILIES:
        raise NamingError(f"layers can be named for SD1, SD2 and SDXL, this is for {family.value}: {layer}")
    component, colon, flat = layer.partition(":")
    if not colon:
        component, _, path = layer.partition(".")
        flat = layer_name(component, path).partition(":")[2]
    path = _unet_path(flat, family) if component in ("unet", *CONTROLNETS) else _text_path(flat)
    if component not in _KOHYA_COMPONENTS[family] or path is None:
        raise _unknown(layer, family)
    return component, path


def _unet_path(flat: str, family: BaseModel) -> str | None:
    if path := _fill(flat, _by_flat_name(_UNET_PATHS)):
        return path
    ldm = _fill(flat, _by_flat_name(_LDM_PATHS))
    return ldm and translate(ldm, _diffusers_paths(family))


def _text_path(flat: str) -> str | None:
    path = _fill(flat, _by_flat_name(_CLIP_PATHS)) or _fill(flat, _open_clip_paths())
    return f"text_model.{path}" if path and path not in _OUTSIDE_TEXT_MODEL else path


def _fill(flat: str, paths: Mapping[str, str]) -> str | None:
    """The dotted path whose flat form is `flat`, numbers apart."""
    path = paths.get(_NUMBER.sub("#", flat))
    if path is None or "#" in flat:
        return None
    for number in _NUMBER.findall(flat):
        path = path.replace("#", number, 1)
    return path


@cache
def _by_flat_name(paths: Sequence[str]) -> dict[str, str]:
    return {path.replace(".", "_"): path for path in paths}


@cache
def _open_clip_paths() -> dict[str, str]:
    return {theirs.replace(".", "_"): ours for theirs, ours in _OPEN_CLIP_PATHS.items()}


@cache
def _ldm_paths(family: BaseModel) -> dict[str, str]:
    return diffusers_to_ldm(_blocks(family))


@cache
def _diffusers_paths(family: BaseModel) -> dict[str, str]:
    return {ldm: diffusers for diffusers, ldm in _ldm_paths(family).items()}


def _blocks(family: BaseModel) -> Iterator[str]:
    """The parts of the family's UNet, in diffusers' spelling."""
    for side, layers, levels in zip(("down", "up"), (2, 3), _LEVELS[family], strict=True):
        for level, has_attention in enumerate(levels):
            block = f"{side}_blocks.{level}"
            yield from (f"{block}.resnets.{layer}" for layer in range(layers))
            yield from (f"{block}.attentions.{layer}" for layer in range(layers) if has_attention)
            if level < len(levels) - 1:
                yield f"{block}.{side}samplers.0"


def _unknown(layer: str, family: BaseModel) -> NamingError:
    return NamingError(f"{family.value} has no layer named {layer}; the LoRA is for another model or damaged")
