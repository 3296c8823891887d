"""Switches on a real GPU: each way gives the float64 sum, rounded once, and the base weights come back bit for bit."""

from __future__ import annotations

import pytest
import torch

from lib_lora.core.base_store import choose_store
from lib_lora.core.keymap import KeyMap
from lib_lora.core.network import load_network
from lib_lora.core.patcher import ModelPatcher
from lib_lora.core.plan import Scale, make_plan, match_network
from tests.toys import c3lier, digest, sd1_unet, write_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""In units of the layer's largest weight: one in its last place."""


def plans_for(unet, folder):
    """One for each of two sets of three files, which act in different layers."""
    keymap = KeyMap.from_modules({"unet": unet})
    layers, plans = c3lier(keymap), []
    for which in "ab":
        matches = []
        for number in range(3):
            path = write_lora(
                folder / f"{which}{number}.safetensors",
                layers[number * 20 :],
                rank=3 + number,
                seed=ord(which) + number,
                std=0.1,
                dtype=torch.float16,
            )
            strength = 0.4 + 0.3 * number
            matches.append((match_network(keymap, load_network(path)), Scale(strength, strength)))
        plans.append(make_plan(matches))
    return plans


@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("store", ["device", "pinned"])
@pytest.mark.parametrize("kind", ["layers", "grouped", "graph"])
def test_a_switch_is_one_rounding_of_the_exact_sum_and_is_taken_back(kind, store, dtype, tmp_path):
    torch.manual_seed(0)
    unet = sd1_unet().to("cuda", dtype)
    plans, base = plans_for(unet, tmp_path), digest(unet)
    weights = {layer.key: layer.live().clone() for layer in KeyMap.from_modules({"unet": unet})}
    patcher = ModelPatcher({"unet": unet}, choose_store(store, [*weights.values()], None), switch=kind)
    for turn in range(6):  # a graph is recorded and replayed
        plan = plans[turn % 2]
        patcher.apply(plan)
        for key, patch in plan.patches.items():
            exact = weights[key].double().flatten(1)
            for adapter, factor in patch.terms:
                up, down, scale = adapter.factors()
                exact = exact + factor * scale * (up.cuda().double() @ down.cuda().double())
            error = (patch.layer.live().double().flatten(1) - exact).abs().max() / exact.abs().max()
            assert error <= LARGEST_ERROR[dtype], (turn, key)
    patcher.restore()
    assert digest(unet) == base
