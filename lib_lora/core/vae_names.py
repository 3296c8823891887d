"""Names of a VAE's weights in diffusers and in LDM's single files, read from the names present.

Source: the two libraries' own module trees, https://github.com/huggingface/diffusers (AutoencoderKL) and
https://github.com/CompVis/latent-diffusion (model.py).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lib_lora.core.ldm_names import translate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
"""What a VAE's names begin with; its training's loss lies beside it in some files."""

_ATTENTION = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
_OLD_ATTENTION = (("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out"))
"""As diffusers named them before 0.18."""
_RESNET = (("", ""), (".conv_shortcut", ".nin_shortcut"))

_DOWN = re.compile(r"encoder\.(?:down_blocks|down)\.(\d+)\.")
_LAYER = re.compile(r"decoder\.(?:up_blocks\.\d+\.resnets|up\.\d+\.block)\.(\d+)\.")


def vae_to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors under LDM's names. Its attention is made of 1x1 convolutions there.

    Args:
        tensors: By diffusers' names, of any version.
    """
    table = dict(_pairs(tensors, (*_ATTENTION, *_OLD_ATTENTION)))
    return {translate(name, table) or name: _with_kernel(name, tensor) for name, tensor in _own(tensors)}


def vae_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors under diffusers' names. Its attention is made of Linear layers there.

    Args:
        tensors: By LDM's names, without ``first_stage_model.``.
    """
    table = {ldm: diffusers for diffusers, ldm in _pairs(tensors, _ATTENTION)}
    return {translate(name, table) or name: _without_kernel(name, tensor) for name, tensor in _own(tensors)}


def _own(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors.items() if name.partition(".")[0] in PARTS)


def _with_kernel(name: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor


def _without_kernel(name: str, tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if ".attn_" in name and tensor.ndim == 4 else tensor


def _pairs(names: Iterable[str], attention: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(Path in diffusers, path in LDM) of all that is named differently."""
    names = list(names)
    levels, layers = _count(_DOWN, names), _count(_LAYER, names)
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        for layer in range(2):
            yield from _resnet(f"{side}.mid_block.resnets.{layer}", f"{side}.mid.block_{layer + 1}")
        for ours, theirs in attention:
            yield f"{side}.mid_block.attentions.0.{ours}", f"{side}.mid.attn_1.{theirs}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        ldm_down, ldm_up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        yield f"{down}.downsamplers.0", f"{ldm_down}.downsample"
        yield f"{up}.upsamplers.0", f"{ldm_up}.upsample"
        for layer in range(layers):
            yield from _resnet(f"{down}.resnets.{layer}", f"{ldm_down}.block.{layer}")
            yield from _resnet(f"{up}.resnets.{layer}", f"{ldm_up}.block.{layer}")


def _resnet(diffusers: str, ldm: str) -> Iterator[tuple[str, str]]:
    return ((f"{diffusers}{ours}", f"{ldm}{theirs}") for ours, theirs in _RESNET)


def _count(number: re.Pattern[str], names: Iterable[str]) -> int:
    return max((int(found[1]) + 1 for name in names if (found := number.match(name))), default=0)
