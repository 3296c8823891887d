"""A LoRA made for another family is refused with both names, at real sizes; one made for this family is applied."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from lib_lora.core.files import FileIdentity, LoraFile
from lib_lora.core.keymap import KeyMap
from lib_lora.core.network import network_from_file
from lib_lora.core.plan import match_network
from lib_lora.errors import BaseModelMismatchError
from tests.fullsize import FAMILIES, diffusers_model, kohya_shapes

NAMES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "flux": "Flux"}
FLUX_LAYERS = {f"lora_unet_double_blocks_{n}_img_attn_qkv": [9216, 3072] for n in range(19)}


@cache
def keymap(family: str) -> KeyMap:
    return KeyMap.from_modules(diffusers_model(family))


@cache
def network(family: str):
    """A file of rank 1 with every C3Lier layer of the family."""
    tensors = {}
    for name, (out, *rest) in (FLUX_LAYERS if family == "flux" else kohya_shapes(family)).items():
        tensors[f"{name}.lora_down.weight"] = torch.zeros(1, *rest)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(out, 1, *(1,) * len(rest[1:]))
    path = Path(f"{family}.safetensors")
    return network_from_file(LoraFile(path, FileIdentity(path, 1, 1, 1), {}, tensors))


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("made_for", NAMES)
def test_a_lora_fits_its_own_family_and_is_refused_by_the_others(made_for, model):
    if made_for == model:
        match = match_network(keymap(model), network(made_for))
        assert not match.unmatched
        assert len(match.layers) == {"sd1": 350, "sd2": 416, "sdxl": 1052}[model]
        return
    sentence = f"{made_for} was made for {NAMES[made_for]}, this model is {NAMES[model]}"
    with pytest.raises(BaseModelMismatchError, match=f"^{sentence}$"):
        match_network(keymap(model), network(made_for))
