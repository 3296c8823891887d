"""What a fuse takes beside the weight and the base: at most two layers in float32, whatever the family."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lib_lora.core.adapters import load_adapter
from lib_lora.core.numerics import SCRATCH_BYTES, Term, fuse_layer
from lib_lora.core.workspace import Workspace

pytestmark = pytest.mark.newest

OUT, IN, KERNEL, RANK = 640, 640, 3, 4
LAYER = OUT * IN * KERNEL**2 * 4
"""Bytes in float32: 14.7 MB, more than the rows that are summed at once."""
SMALL = 1.05
"""For factors and other small things."""


class Allocations(TorchDispatchMode):
    """Bytes of all tensors made since the start that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in known:
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.1


def families() -> dict[str, dict[str, torch.Tensor]]:
    columns = IN * KERNEL**2
    lora = {"lora_up": random(OUT, RANK, 1, 1), "lora_down": random(RANK, IN, KERNEL, KERNEL)}
    halves = {"a": (OUT, RANK), "b": (RANK, columns)}
    return {
        "LoRA": lora,
        "LoHa": {f"hada_w{i}_{side}": random(*shape) for i in (1, 2) for side, shape in halves.items()},
        "LoKr": {"lokr_w1": random(8, 8), "lokr_w2": random(OUT // 8, IN // 8, KERNEL, KERNEL)},
        "IA3 on outputs": {"weight": random(OUT), "on_input": torch.tensor(0.0)},
        "IA3 on inputs": {"weight": random(IN), "on_input": torch.tensor(1.0)},
        "OFT": {"oft_blocks": random(64, 10, 10)},
        "BOFT": {"oft_blocks": random(4, 64, 10, 10)},
        "GLoRA": {
            "a1.weight": random(IN, RANK, 1, 1),
            "a2.weight": random(RANK, IN, 1, 1),
            "b1.weight": random(OUT, RANK, 1, 1),
            "b2.weight": random(RANK, IN, KERNEL, KERNEL),
        },
        "DoRA on outputs": lora | {"dora_scale": random(OUT, 1, 1, 1)},
        "DoRA on inputs": lora | {"dora_scale": random(1, IN, 1, 1)},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*families(), "all of them"])
def test_a_fuse_takes_at_most_two_layers_of_memory(family, dtype):
    made = families()
    chosen = made.values() if family == "all of them" else [made[family]]
    terms = [Term(load_adapter(tensors), 0.5) for tensors in chosen]
    base = random(OUT, IN, KERNEL, KERNEL).to(dtype)
    out = torch.empty_like(base)
    with Allocations() as allocations:
        fuse_layer(base, terms, out, Workspace())
    assert out.isfinite().all()
    pieces = 3 * SCRATCH_BYTES if family == "all of them" else 0  # of those that are added some rows at a time
    assert allocations.peak <= 2 * LAYER * SMALL + pieces
