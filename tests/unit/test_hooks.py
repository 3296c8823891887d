"""Hook mode against the same update written into the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lib_lora.core.adapters import load_adapter
from lib_lora.core.division import divide
from lib_lora.core.hooks import HookedLayers, LinearPath, is_hookable, make_path
from lib_lora.core.layers import LayerRef
from lib_lora.core.numerics import Term
from lib_lora.core.plan import FusePlan, LayerPatch
from lib_lora.core.workspace import Workspace

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}  # relative to the largest output
CONVS = {
    "plain": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "uneven": {"padding": (0, 1), "stride": (1, 2)},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "groups": {"padding": 1, "groups": 4},
    "1x1": {"kernel_size": 1},
    "no bias": {"padding": 1, "bias": False},
}


class Identity:
    """Stands in for a network: only its name counts here."""

    uid = "network"


def layer_of(module: nn.Module) -> LayerRef:
    return LayerRef("unet.x", "unet", "", tuple(module.weight.shape), "x.weight", None, module)


def patch_of(layer: LayerRef, count: int, rank: int = 3, seed: int = 0) -> LayerPatch:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(count):
        tensors = {
            "lora_up": torch.randn(layer.shape[0], rank, *(1,) * len(layer.shape[2:]), generator=generator) * 0.2,
            "lora_down": torch.randn(rank, *layer.shape[1:], generator=generator) * 0.2,
            "alpha": torch.tensor(2.0),
        }
        parts.append(Term(load_adapter(tensors), 0.7))
    return LayerPatch(layer, tuple(parts), (Identity(),) * count)


def fused(module: nn.Module, patch: LayerPatch) -> nn.Module:
    """A copy of the module with the update in its weight, in float64."""
    module = copy.deepcopy(module).double()
    module._forward_hooks.clear()
    for adapter, factor in patch.terms:
        module.weight += factor * adapter.delta_weight(torch.zeros(patch.layer.shape)).double()
    return module


@torch.no_grad()
def check(module: nn.Module, x: torch.Tensor, patch: LayerPatch) -> None:
    before = module(x)
    hooks = HookedLayers()
    hooks.apply(FusePlan({patch.layer.key: patch}))
    expected = fused(module, patch)(x.double())
    error = (module(x).double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[x.dtype]
    assert not torch.equal(module(x), before)
    hooks.clear()
    assert torch.equal(module(x), before)
    assert not module._forward_hooks


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("kind", CONVS)
def test_a_hooked_convolution_is_the_fused_one(kind, count, dtype):
    torch.manual_seed(0)
    module = nn.Conv2d(8, 12, **{"kernel_size": 3} | CONVS[kind]).to(dtype).requires_grad_(False)
    check(module, torch.randn(2, 8, 9, 10).to(dtype), patch_of(layer_of(module), count))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 24), (2, 5, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("count", [1, 7])
def test_a_hooked_linear_is_the_fused_one(count, shape, dtype):
    torch.manual_seed(0)
    module = nn.Linear(24, 40).to(dtype).requires_grad_(False)
    check(module, torch.randn(shape).to(dtype), patch_of(layer_of(module), count))


def test_outputs_that_are_not_contiguous_are_right():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    check(conv, x, patch_of(layer_of(conv), 2))


def test_gradients_reach_the_input():
    torch.manual_seed(0)
    for module, x in ((nn.Linear(8, 8), torch.randn(3, 8)), (nn.Conv2d(8, 8, 3), torch.randn(1, 8, 5, 5))):
        module.requires_grad_(False)
        patch = patch_of(layer_of(module), 2)
        hooks = HookedLayers()
        hooks.apply(FusePlan({"unet.x": patch}))
        with torch.enable_grad():
            ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
            module(ours).sum().backward()
            fused(module, patch)(theirs).sum().backward()
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-5)


def test_a_part_of_a_fused_projection_gets_its_rows_only():
    torch.manual_seed(0)
    module = nn.Linear(16, 48).requires_grad_(False)
    layer = LayerRef("unet.q", "unet", "", (16, 16), "qkv.weight", (16, 32), module)
    hooks = HookedLayers()
    patch = patch_of(layer, 2)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = module(x)
        hooks.apply(FusePlan({layer.key: patch}))
        after = module(x)
    delta = sum(f * a.delta_weight(torch.zeros(16, 16)) for a, f in patch.terms)
    assert torch.equal(after[..., :16], before[..., :16])
    assert torch.equal(after[..., 32:], before[..., 32:])
    assert torch.allclose(after[..., 16:32], before[..., 16:32] + x @ delta.T, atol=1e-5)


def test_many_ranks_on_a_small_layer_become_one_dense_product():
    module = nn.Linear(16, 16).requires_grad_(False)
    path = make_path(patch_of(layer_of(module), 7, rank=16), Workspace())
    assert isinstance(path, LinearPath)
    assert path.down is None
    assert path.nbytes == 16 * 16 * 4


def test_any_number_of_loras_is_one_hook_a_layer():
    module = nn.Linear(64, 64).requires_grad_(False)
    layer = layer_of(module)
    hooks = HookedLayers()
    for count in (1, 7, 2):
        hooks.apply(FusePlan({layer.key: patch_of(layer, count)}))
        assert len(module._forward_hooks) == 1
    assert hooks.apply(FusePlan({layer.key: patch_of(layer, 2)})).written == ()
    hooks.clear()


def test_a_failure_while_hooking_leaves_no_hook(monkeypatch):
    module = nn.Linear(8, 8).requires_grad_(False)
    layer = layer_of(module)
    hooks = HookedLayers()
    hooks.apply(FusePlan({layer.key: patch_of(layer, 1)}))
    monkeypatch.setattr("lib_lora.core.hooks.make_path", lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        hooks.apply(FusePlan({layer.key: patch_of(layer, 2)}))
    assert not module._forward_hooks
    assert hooks.applied_key == ""


def test_multihead_attention_is_not_hookable():
    attention = nn.MultiheadAttention(8, 2)
    layer = LayerRef("te1.q", "te1", "BASE", (8, 8), "in_proj_weight", (0, 8), attention, "in_proj_weight")
    assert not is_hookable(layer)


def test_a_layer_whose_input_another_forward_changes_is_fused():
    module = nn.Linear(8, 8)
    layer = layer_of(module)
    plan = FusePlan({layer.key: patch_of(layer, 2)})
    assert layer.key in divide(plan, hook=True).hooked.patches
    original = module.forward
    module.forward = lambda x: original(x + 1)
    assert layer.key in divide(plan, hook=True).fused.patches
    del module.forward
    assert layer.key in divide(plan, hook=True).hooked.patches


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(12, 8), torch.randn(5, 12)),
        (nn.Conv2d(12, 8, 1), torch.randn(1, 12, 6, 6)),
        (nn.Conv2d(12, 8, 3, padding=1), torch.randn(1, 12, 6, 6)),
    ],
    ids=["linear", "1x1", "3x3"],
)
def test_a_hook_works_under_autocast(module, x):
    path = make_path(patch_of(layer_of(module), 7, rank=2), Workspace())
    with torch.no_grad():
        exact = path(module, (x,), module(x).clone())
        with torch.autocast("cpu", torch.bfloat16):
            cast = path(module, (x,), module(x))
    largest = TOLERANCE[torch.bfloat16] * exact.abs().max()
    assert (cast.float() - exact).abs().max() <= largest
