"""A whole model under the names of diffusers, and under the original names of SD1, SD2 and SDXL.

Which tensors have no place in the other layout can be told from what was used: those of training, constants, and the
parts of a text encoder that nobody reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.ldm_names import diffusers_to_ldm, ldm_to_diffusers, translate
from lib_lora.core.opening import shown
from lib_lora.core.single_file import FAMILIES, UNET_PREFIX, VAE_PREFIX, Family
from lib_lora.core.text_towers import TEXT_MODEL, original_tensors, tower_tensors
from lib_lora.core.vae_names import PARTS as VAE_PARTS
from lib_lora.core.vae_names import vae_to_diffusers, vae_to_ldm
from lib_lora.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.saving import LazyTensor

_CLIP_LAYER = f"{TEXT_MODEL}encoder.layers."
_CONVOLUTION = 4


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensors[name] for name in tensors if name.startswith(prefix)}


def diffusers_parts(
    tensors: Mapping[str, Tensor], family: Family, configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
    """Part → its tensors under diffusers' names; and which of the checkpoint's tensors these are.

    Args:
        tensors: The checkpoint's, by their original names.
        family: What it is.
        configs: Text encoder → what it is made of in transformers; it tells which layers there are.
    """
    unet, vae = _under(tensors, UNET_PREFIX), _under(tensors, VAE_PREFIX)
    table = ldm_to_diffusers(unet)
    paths = {name: path for name in unet if (path := translate(name, table))}
    parts = {"unet": {path: unet[name] for name, path in paths.items()}, "vae": vae_to_diffusers(vae)}
    used = {UNET_PREFIX + name for name in paths}
    used |= {VAE_PREFIX + name for name in vae if name.partition(".")[0] in VAE_PARTS}
    for tower in family.towers:
        config = configs[tower.component]
        own = parts.setdefault(tower.component, {})
        for name in tensors:
            made = tower_tensors(tower, {name: tensors[name]}) if name.startswith(tower.prefix) else {}
            kept = {path: tensor for path, tensor in made.items() if _in_tower(path, config)}
            own |= kept
            used |= {name} if kept else set()
    return parts, used


def _in_tower(path: str, config: Mapping[str, Any]) -> bool:
    """Whether transformers' model of this configuration has a weight of this name."""
    if not path.startswith(TEXT_MODEL):
        return any("WithProjection" in name for name in config["architectures"])
    layer = path.removeprefix(_CLIP_LAYER).partition(".")[0] if path.startswith(_CLIP_LAYER) else "0"
    return layer.isdecimal() and int(layer) < config["num_hidden_layers"]


def family_of(parts: Mapping[str, Mapping[str, Tensor]], source: Path) -> Family:
    """Told by the second text encoder, and by the layers that frame SD2's and SD1's attention.

    Args:
        parts: Part of a diffusers folder → its tensors.
        source: The folder, for the sentence of a refusal.

    Raises:
        ModelError: If a part is missing, or the UNet is another.
    """
    frames = [tensor for name, tensor in parts.get("unet", {}).items() if name.endswith(".proj_in.weight")]
    missing = [part for part in ("unet", "vae", "text_encoder") if part not in parts]
    if missing or not frames:
        raise ModelError(f"{shown(source)} is no SD1, SD2 or SDXL model: it has no {(missing or ['attention'])[0]}")
    name = "sdxl" if "text_encoder_2" in parts else "sd1" if frames[0].ndim == _CONVOLUTION else "sd2"
    return next(family for family in FAMILIES if family.config == name)


def all_original_tensors(
    parts: Mapping[str, Mapping[str, Tensor]], family: Family
) -> tuple[dict[str, Tensor | LazyTensor], set[str]]:
    """Tensors under the original names; and ``part.name`` of those that have one.

    Args:
        parts: Part of a diffusers folder → its tensors.
        family: What it is.

    Raises:
        ModelError: If a text encoder lacks a part of a fused weight.
    """
    table = diffusers_to_ldm(parts["unet"])
    paths = {name: path for name in parts["unet"] if (path := translate(name, table))}
    tensors: dict[str, Tensor | LazyTensor] = {UNET_PREFIX + path: parts["unet"][name] for name, path in paths.items()}
    tensors |= {VAE_PREFIX + name: tensor for name, tensor in vae_to_ldm(parts["vae"]).items()}
    used = {f"unet.{name}" for name in paths}
    used |= {f"vae.{name}" for name in parts["vae"] if name.partition(".")[0] in VAE_PARTS}
    for tower in family.towers:
        originals = original_tensors(tower, parts[tower.component])
        tensors |= originals
        back = tower_tensors(tower, {name: _as_tensor(tensor) for name, tensor in originals.items()})
        kept = {path.removeprefix(TEXT_MODEL) for path in back}
        used |= {f"{tower.component}.{n}" for n in parts[tower.component] if n.removeprefix(TEXT_MODEL) in kept}
    return tensors, used


def _as_tensor(tensor: Tensor | LazyTensor) -> Tensor:
    """A tensor of the same shape that takes no memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
