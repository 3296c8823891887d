"""Each block alone, for each length of list and each family: it changes exactly its layers, as much as they change.

Which layer lies in which block is told by kohya's scripts and their names of the original model's layers.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lib_lora import LoraSession
from lib_lora.core.saving import save_tensors
from tests.family_files import FAMILIES, family_tensors
from tests.fullsize import facts, to_sgm
from tests.toys import c3lier, kohya_name, lierla, sd1_unet, sdxl_unet, text_encoder

INDEX = facts("block_index")
NAMES = ["M00" if name == "MID" else name for name in INDEX["lbw_names"]]
LENGTHS = {26: "sd1", 17: "sd1", 20: "sdxl", 12: "sdxl"}
MOST_LAYERS = 1
"""Of each kind in a block: all would take minutes."""
KINDS = ["LoRA LierLa", *FAMILIES, "norm", "bias"]
CASES = [
    pytest.param(kind, length, marks=() if length == 26 or kind == "LoRA LierLa" else pytest.mark.slow)
    for kind in KINDS
    for length in LENGTHS
]


SD1_NAMES = {name: entry["ldm"] for name, entry in facts("sd1_unet_diffusers_to_ldm").items()}
SDXL_PREFIXES = facts("sdxl_diffusers_to_sgm_prefix")
FIRST = {"input_blocks": 1, "middle_block": 13, "output_blocks": 14}


def place_of(family: str, key: str) -> int | None:
    """Place of a layer's block in a list of 26 numbers; None outside of all blocks."""
    component, _, path = key.removesuffix(".bias").partition(".")
    if component != "unet":
        return 0
    name = f"{path}.weight"
    kind, number, *_ = (SD1_NAMES[name] if family == "sd1" else to_sgm(name, SDXL_PREFIXES)).split(".")
    if kind not in FIRST:
        return None
    return FIRST[kind] + (0 if kind == "middle_block" else int(number))


def test_the_places_here_are_those_of_kohyas_scripts():
    modules = {name.removesuffix(".weight") for name in sd1_unet().state_dict() if name.endswith(".weight")}
    keys = {f"lora_unet_{name.replace('.', '_')}": f"unet.{name}" for name in modules}
    theirs = {name: place for name, place in INDEX["sd1_lbw_index"].items() if name.startswith("lora_unet_")}
    assert {name: place_of("sd1", keys[name]) for name in theirs} == theirs
    assert len(theirs) > 250


@pytest.fixture(scope="module")
def pipes():
    torch.manual_seed(0)
    unets = {"sd1": sd1_unet(), "sdxl": sdxl_unet()}
    return {name: SimpleNamespace(unet=unet, text_encoder=text_encoder(), vae=None) for name, unet in unets.items()}


def some(layers) -> list:
    """A few layers of each kind in each block, by the places here."""
    groups = defaultdict(list)
    for family, layer in layers:
        groups[place_of(family, layer.key), len(layer.shape)].append(layer)
    return [layer for group in groups.values() for layer in group[:MOST_LAYERS]]


def file_of(kind: str, family: str, keymap) -> dict[str, torch.Tensor]:
    """A LoRA file that changes layers in all blocks that the kind can change."""
    biases = {one.key.removesuffix(".bias"): one.shape for one in keymap.parameters if one.key.endswith(".bias")}
    if kind == "norm":
        layers = [one for one in keymap if "norm" in one.key and place_of(family, one.key) is not None]
        return {f"{kohya_name(one)}.{part}_norm": torch.ones(one.shape) for one in layers for part in "wb"}
    first = [one for one in keymap if one.key == "unet.conv_in"]
    chosen = lierla(keymap) if kind == "LoRA LierLa" else [*c3lier(keymap), *first]
    layers = some((family, one) for one in chosen)
    if kind == "bias":
        return {f"{kohya_name(one)}.diff_b": torch.ones(biases[one.key]) for one in layers if one.key in biases}
    algorithm = "LoRA" if kind == "LoRA LierLa" else kind
    parts = {kohya_name(one): family_tensors(algorithm, one.shape, seed=len(one.key)) for one in layers}
    return {f"{name}.{suffix}": part for name, some_parts in parts.items() for suffix, part in some_parts.items()}


@pytest.mark.parametrize(("kind", "length"), CASES)
def test_each_block_alone_changes_exactly_its_layers_in_every_family(pipes, tmp_path, kind, length):
    family = LENGTHS[length]
    session = LoraSession.for_pipeline(pipes[family], tmp_path)
    save_tensors(tmp_path / "x.safetensors", file_of(kind, family, session.keymap), {})
    try:
        base = {one.key: one.live().clone() for one in session.keymap.parameters}
        assert session.set([("x", 1.0)]).refused == ()
        whole = {one.key: one.live().clone() for one in session.keymap.parameters}
        moved = {key: place_of(family, key) for key in base if not torch.equal(whole[key], base[key])}
        weighed = INDEX["lbw_target_idx"][str(length)]
        for number, place in enumerate(weighed):
            session.set(f"<lora:x:1:lbw={','.join(str(int(one == number)) for one in range(length))}>")
            expected = {key: whole[key] if moved.get(key) == place else base[key] for key in base}
            wrong = [one.key for one in session.keymap.parameters if not torch.equal(one.live(), expected[one.key])]
            assert wrong == [], NAMES[place]
        there = set(weighed) & set(moved.values())
        assert len(there) >= (len(weighed) if kind not in ("norm", "LoRA LierLa") else 12)
    finally:
        session.unload()
