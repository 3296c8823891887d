"""Families of models, recognised in LoRA files and in models by their layers."""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Shapes = Mapping[str, Sequence[int]]


class BaseModel(Enum):
    """A family whose models share layer names and shapes; the value is its name for people."""

    SD1 = "SD 1.x"
    SD2 = "SD 2.x"
    SDXL = "SDXL"
    SD3 = "SD 3.x"
    FLUX = "Flux"
    UNKNOWN = "an unknown model"

    def compatible(self, other: BaseModel) -> bool:
        """Whether one can be meant for the other: no if both are known and differ."""
        return self is other or BaseModel.UNKNOWN in (self, other)

    @classmethod
    def of_model(cls, shapes: Shapes) -> BaseModel:
        """Family of a model.

        Args:
            shapes: Layer name (see `naming`) → shape of its weight, (out, in[, kh, kw]).
        """
        return _of_names(shapes) or _of_widths(shapes) or _of_joint_blocks(shapes) or _of_te2(shapes) or cls.UNKNOWN

    @classmethod
    def of_file(cls, shapes: Shapes, metadata: Mapping[str, str]) -> BaseModel:
        """Family that a LoRA file was made for. Its layers count; its metadata only where they do not tell.

        Args:
            shapes: Layer name → shape of the weight it changes, (out, in[, kh, kw]), or () if that is not known.
            metadata: Header metadata as kohya's trainer and the ModelSpec standard write it.
        """
        return guess_of_file(shapes, metadata).family


class Guess(NamedTuple):
    """A family, and what tells it: a part of a sentence for people."""

    family: BaseModel
    evidence: str


def guess_of_file(shapes: Shapes, metadata: Mapping[str, str]) -> Guess:
    """The family of a LoRA file with the reason; see `BaseModel.of_file`."""
    said = _of_metadata(metadata)
    if family := _of_names(shapes):
        return Guess(family, "names of its layers")
    if family := _of_widths(shapes):
        return Guess(family, "widths of its layers")
    if said in _WITH_MORE_TEXT_ENCODERS:
        return Guess(said, "its metadata")
    if _has_blocks(shapes):
        return Guess(BaseModel.UNKNOWN, "")
    if family := _of_te2(shapes):
        return Guess(family, "its second text encoder")
    if said:
        return Guess(said, "its metadata")
    family = _of_clip_l(shapes)
    return Guess(family, "its text encoder alone") if family else Guess(BaseModel.UNKNOWN, "")


_MARKERS = (
    (re.compile(r"_(img|txt)_(mod_linear|mlp_fc[12])|_to_qkv_mlp_proj"), BaseModel.UNKNOWN),
    (re.compile(r"(double|single|single_transformer)_blocks_"), BaseModel.FLUX),
    (re.compile(r"joint_blocks_"), BaseModel.SD3),
    (re.compile(r":(add_embedding|label_emb)_|_[0-9]_transformer_blocks_[1-9]"), BaseModel.SDXL),
)
"""Text in layer names → family; the first that occurs counts. Only SDXL's UNet has transformers deeper than 1.

The first line is Hunyuan Video and Flux 2, which have blocks named as Flux's.
"""

_BLOCK = re.compile(r"(unet|transformer):transformer_blocks_[0-9]+_(attn_|ff_|norm1_)")
_BLOCK_INPUTS = re.compile(r"_attn_(to_[qkv]|to_out_0|to_add_out)$|_proj$|_norm1(_context)?_linear$")
_BLOCK_WIDTHS = {1536: BaseModel.SD3, 2432: BaseModel.SD3, 3072: BaseModel.FLUX}
"""Width of blocks that diffusers names alike in SD 3 and Flux → family; 2432 is SD 3.5 large."""
_JOINT = "transformer_blocks_0_attn_add_q_proj"

_WITH_MORE_TEXT_ENCODERS = (BaseModel.SDXL, BaseModel.SD3, BaseModel.FLUX)
_TE2 = re.compile(r"^te2:(?!encoder_block_)", re.M)
"""The second CLIP, of SDXL and SD 3; Flux's second text encoder is T5."""

_UNETS = ("unet:", "controlnet")
"""How names of layers of a UNet, or of a ControlNet, which is a copy of a half of it, begin."""
_CONTEXT_LAYERS = ("attn2_to_k", "attn2_to_v")
_CONTEXT = {768: BaseModel.SD1, 1024: BaseModel.SD2, 2048: BaseModel.SDXL, 1280: BaseModel.SDXL}
"""Width of the text embedding that the UNet reads → family; 1280 is SDXL's refiner."""

_TE_LAYERS = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1")
_OPEN_CLIP_H = 1024
_CLIP_L = 768
"""Width of CLIP ViT-L: SD 1.x's only text encoder, but also the first of SDXL, SD 3 and Flux."""

_METADATA_KEYS = ("ss_base_model_version", "modelspec.architecture")
_METADATA_TEXTS = (
    ("sdxl", BaseModel.SDXL),
    ("stable-diffusion-xl", BaseModel.SDXL),
    ("flux", BaseModel.FLUX),
    ("sd3", BaseModel.SD3),
    ("stable-diffusion-3", BaseModel.SD3),
    ("sd_v2", BaseModel.SD2),
    ("stable-diffusion-v2", BaseModel.SD2),
    ("sd_v1", BaseModel.SD1),
    ("stable-diffusion-v1", BaseModel.SD1),
)
_METADATA_V2 = {"True": BaseModel.SD2, "False": BaseModel.SD1}


def _of_names(shapes: Shapes) -> BaseModel | None:
    text = "\n".join(shapes)
    return next((family for marker, family in _MARKERS if marker.search(text)), None)


def _has_blocks(shapes: Shapes) -> bool:
    return any(_BLOCK.match(name) for name in shapes)


def _of_joint_blocks(shapes: Shapes) -> BaseModel | None:
    """SD 3 of any width: a whole model of these blocks without Flux's single ones."""
    return BaseModel.SD3 if any(name.endswith(_JOINT) for name in shapes) else None


def _of_te2(shapes: Shapes) -> BaseModel | None:
    return BaseModel.SDXL if _TE2.search("\n".join(shapes)) else None


def _of_widths(shapes: Shapes) -> BaseModel | None:
    blocks = (
        _BLOCK_WIDTHS.get(shape[1])
        for name, shape in shapes.items()
        if len(shape) > 1 and _BLOCK.match(name) and _BLOCK_INPUTS.search(name)
    )
    if family := next(filter(None, blocks), None):
        return family
    contexts = [_CONTEXT[width] for width in _widths(shapes, _UNETS, _CONTEXT_LAYERS) if width in _CONTEXT]
    if contexts:
        return contexts[0]
    return BaseModel.SD2 if _OPEN_CLIP_H in _widths(shapes, "te1:", _TE_LAYERS) else None


def _of_clip_l(shapes: Shapes) -> BaseModel | None:
    """The text encoder that says least."""
    only_te = not any(name.startswith((*_UNETS, "transformer:")) for name in shapes)
    return BaseModel.SD1 if only_te and _CLIP_L in _widths(shapes, "te1:", _TE_LAYERS) else None


def _widths(shapes: Shapes, component: str | tuple[str, ...], endings: tuple[str, ...]) -> Iterator[int]:
    return (
        shape[1]
        for name, shape in shapes.items()
        if name.startswith(component) and name.endswith(endings) and len(shape) > 1
    )


def _of_metadata(metadata: Mapping[str, str]) -> BaseModel | None:
    for key in _METADATA_KEYS:
        said = metadata.get(key, "").lower()
        if family := next((family for text, family in _METADATA_TEXTS if text in said), None):
            return family
    return _METADATA_V2.get(metadata.get("ss_v2", ""))
