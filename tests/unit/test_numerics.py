import pytest
import torch

from lib_lora.core.adapters import load_adapter
from lib_lora.core.numerics import Term, fuse_layer, is_finite_for_sure
from lib_lora.core.webui_rounding import fuse_layer_a1111
from lib_lora.core.workspace import Workspace

ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ROUNDINGS = {torch.float32: 8, torch.float16: 0.51, torch.bfloat16: 0.6}
"""Largest error in units of the weight's last place: one rounding is half a unit; fp32 sums have no extra bits."""


def terms(count: int, shape: tuple[int, ...], *, rank: int = 8, std: float = 0.1, dtype=torch.float32) -> list[Term]:
    result = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ones = (1,) * len(shape[2:])
        up = (torch.randn(shape[0], rank, *ones, generator=generator) * std).to(dtype)
        down = (torch.randn(rank, *shape[1:], generator=generator) * std).to(dtype)
        adapter = load_adapter({"lora_up": up, "lora_down": down, "alpha": torch.tensor(rank / 2)})
        result.append(Term(adapter, 0.3 + 0.2 * seed))
    return result


def exact(base: torch.Tensor, parts: list[Term]) -> torch.Tensor:
    total = base.double().flatten(1)
    for adapter, factor in parts:
        up, down, scale = adapter.factors()
        total = total + factor * scale * (up.double() @ down.double())
    return total.reshape(base.shape)


@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("shape", [(48, 32), (48, 32, 1, 1), (24, 16, 3, 3)])
def test_a_fuse_is_one_rounding_of_the_exact_sum(dtype, count, shape):
    base = torch.randn(shape, generator=torch.Generator().manual_seed(99)).to(dtype)
    parts = terms(count, shape, dtype=dtype)
    out = torch.empty_like(base)
    fuse_layer(base, parts, out)
    reference = exact(base, parts)
    unit = reference.abs().clamp_min(0.05) * ULP[dtype]
    error = ((out.double() - reference).abs() / unit).max().item()
    limit = ROUNDINGS[dtype] if dtype != torch.bfloat16 else 1.5  # factors times strength are bf16 in a bf16 GEMM
    assert error <= limit


def test_a_fuse_reads_base_only_and_writes_out_only():
    base = torch.randn(16, 24)
    before = base.clone()
    out = torch.full_like(base, float("nan"))
    fuse_layer(base, terms(2, (16, 24)), out)
    assert torch.equal(base, before)
    assert torch.isfinite(out).all()


def test_a_reused_workspace_changes_nothing():
    workspace = Workspace()
    for shape in ((48, 32), (8, 128), (24, 16, 3, 3), (48, 32)):
        base = torch.randn(shape)
        ours, fresh = torch.empty_like(base), torch.empty_like(base)
        fuse_layer(base, terms(3, shape), ours, workspace)
        fuse_layer(base, terms(3, shape), fresh)
        assert torch.equal(ours, fresh)


@pytest.mark.parametrize("dtype", ULP)
def test_files_of_different_types_are_summed_as_their_numbers_are(dtype):
    base = torch.randn(48, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    parts = [terms(3, (48, 32), dtype=kind)[number] for number, kind in enumerate(kinds)]
    out = torch.empty_like(base)
    fuse_layer(base, parts, out)
    reference = exact(base, parts)
    unit = reference.abs().clamp_min(0.05) * ULP[dtype]
    limit = ROUNDINGS[dtype] if dtype != torch.bfloat16 else 1.5
    assert ((out.double() - reference).abs() / unit).max() <= limit


def test_channels_last_weights_are_fused_as_they_lie():
    base = torch.randn(24, 16, 3, 3)
    plain, moved = torch.empty_like(base), base.to(memory_format=torch.channels_last)
    out = torch.empty_like(moved)
    fuse_layer(base, terms(2, base.shape), plain)
    fuse_layer(moved, terms(2, base.shape), out)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out, plain, atol=1e-6)


def test_a_small_alpha_does_not_underflow_in_fp16():
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(32, 4, generator=generator) * 1e-3, torch.randn(4, 32, generator=generator)
    adapter = load_adapter({"lora_up": up.half(), "lora_down": down.half(), "alpha": torch.tensor(4e-4)})
    base, out = torch.zeros(32, 32, dtype=torch.float16), torch.empty(32, 32, dtype=torch.float16)
    fuse_layer(base, [Term(adapter, 1.0)], out)
    reference = adapter.delta_weight(torch.zeros(32, 32)).half()
    assert reference.any()
    assert torch.equal(out, reference)


@pytest.mark.newest
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_webui_mode_rounds_after_every_operation(dtype):
    shape = (24, 16, 3, 3)
    base = torch.randn(shape).to(dtype)
    parts = terms(3, shape, dtype=dtype)
    out = torch.empty_like(base)
    fuse_layer_a1111(base, parts, out)
    weight = base.clone()
    for adapter, factor in parts:  # updown = up @ down; updown * calc_scale() * multiplier(); weight += updown
        up, down, scale = adapter.factors()
        updown = torch.matmul(up, down).reshape(shape)
        updown = torch.mul(torch.mul(updown, scale), factor)
        weight = torch.add(weight, updown)
    assert torch.equal(out, weight)
    fused = torch.empty_like(base)
    fuse_layer(base, parts, fused)
    assert dtype == torch.float32 or not torch.equal(out, fused)


def test_the_proof_of_finiteness_is_safe():
    parts = terms(2, (16, 16), std=10.0)
    peak = exact(torch.zeros(16, 16), parts).abs().max().item()
    assert is_finite_for_sure(parts, 1.0, torch.float32)
    assert not is_finite_for_sure([Term(part.adapter, 1e6) for part in parts], 1.0, torch.float16)
    assert peak <= sum(factor * adapter.bound() for adapter, factor in parts)
