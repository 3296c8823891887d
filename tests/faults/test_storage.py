"""Weights that move between devices, and models that come and go."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import c3lier, digest, lierla, sd1_unet, text_encoder, write_lora

from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog
from lib_lora.core.keymap import KeyMap

SWITCHES, WARM, GROWTH = 50, 10, 0.03
MEGABYTE = 1 << 20
WALK = (
    [("ink", 0.8)],
    [("ink", 0.8), ("wash", -0.4)],
    [],
    [("wash", 1.0)],
    [("ink", 0.3), ("wash", 0.3)],
    [],
)


def model() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"unet": sd1_unet(), "te1": text_encoder()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    keymap = KeyMap.from_modules(model())
    write_lora(folder / "ink.safetensors", lierla(keymap), seed=1)
    write_lora(folder / "wash.safetensors", c3lier(keymap), seed=2)
    return folder


def move(module: nn.Module) -> None:
    """What `.to(device)` does to a module: other memory with the same numbers behind every parameter."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


MOVES = {
    "none": lambda component: None,
    "medvram": move,
    "lowvram": lambda component: [move(block) for block in component.children() if list(block.parameters())][:2],
}


@pytest.mark.parametrize("component", ["unet", "te1"])
@pytest.mark.parametrize("way", MOVES)
def test_weights_that_are_moved_between_switches_end_as_those_that_stay(folder, way, component):
    still, moved = model(), model()
    sessions = [LoraSession(components, LoraCatalog([folder])) for components in (still, moved)]
    for request in WALK:
        for session in sessions:
            assert not session.set(request).refused
        MOVES[way](moved[component])
        assert digest(*moved.values()) == digest(*still.values())


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which only Linux has")
def test_memory_does_not_grow_with_the_number_of_models_that_were_fused(folder):
    wide = {"unet": sd1_unet(block_out_channels=(32, 64, 96, 96))}
    write_lora(folder / "wide.safetensors", c3lier(KeyMap.from_modules(wide)), seed=3)
    sizes = []
    for _ in range(SWITCHES):
        components = copy.deepcopy(wide)
        LoraSession(components, LoraCatalog([folder])).set([("wide", 1.0)])
        del components
        gc.collect()
        sizes.append(anonymous_bytes())
    assert sizes[-1] <= sizes[WARM] * (1 + GROWTH) + MEGABYTE


def test_base_weights_are_freed_with_their_model(folder):
    components = model()
    session = LoraSession(components, LoraCatalog([folder]))
    session.set([("ink", 1.0)])
    layer = session.keymap.find("unet:down_blocks_0_attentions_0_proj_in")
    kept = weakref.ref(session._patcher.store._copies[layer.key])
    assert kept() is not None
    del components, session, layer
    gc.collect()
    assert kept() is None
