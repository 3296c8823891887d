"""The one kernel: W = round(W0 + Σ factor · ΔW), summed in float32, rounded once.

The patcher calls it on live weights and the merge on a checkpoint's tensors, so that a merged file holds what the
prompt would have made.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from lib_lora.core.adapters import LowRankAdapter, WeightAdapter, is_low_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SCRATCH_BYTES = 4 << 20
"""Rows of a float32 scratch are taken in pieces of this size, which stay in the processor's cache."""


class Term(NamedTuple):
    """One summand of a layer: factor · ΔW, the factor being all strengths in one number."""

    adapter: WeightAdapter
    factor: float


class Stack(NamedTuple):
    """Several low-rank updates of one layer as one: ΔW = gain · up @ down.

    Attributes:
        up: (out, Σ rank), every factor and scale folded in, brought near 1 by a power of two.
        down: (Σ rank, in·kh·kw).
        gain: That power of two, which a GEMM applies in float32: a small alpha / rank can not underflow in fp16.
    """

    up: Tensor
    down: Tensor
    gain: float


class Workspace:
    """Memory that is reused from layer to layer.

    A fresh block of some MB is handed out by the system page by page, which costs more than filling it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor of `shape`, valid until the next call with this name."""
        buffer = self._buffers.get((name, dtype, device))
        size = math.prod(shape)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


def stack(terms: Sequence[Term], dtype: torch.dtype, device: torch.device, workspace: Workspace) -> Stack:
    """Concatenate low-rank adapters along their rank.

    Args:
        terms: At least one; every adapter is a LowRankAdapter.
        dtype: Floating dtype of the result.
        device: Where the result lives.
        workspace: Holds the result, until the next call with it.
    """
    factors = [cast("LowRankAdapter", term.adapter).factors() for term in terms]
    scales = [low.scale * term.factor for low, term in zip(factors, terms, strict=True)]
    gain = 1.0 if dtype != torch.float16 else _power_of_two(max(map(abs, scales)))
    up = _joined([low.up for low in factors], 1, torch.float32, device, workspace)
    down = _joined([low.down for low in factors], 0, dtype, device, workspace)
    ranks = [low.up.shape[1] for low in factors]
    each = [scale / gain for scale, rank in zip(scales, ranks, strict=True) for _ in range(rank)]
    up.mul_(torch.tensor(each, dtype=torch.float32, device=device))
    return Stack(up.to(dtype), down, gain)


def _joined(parts: list[Tensor], dim: int, dtype: torch.dtype, device: torch.device, workspace: Workspace) -> Tensor:
    """Concatenate in reused memory, converted on the way."""
    length, other = sum(part.shape[dim] for part in parts), parts[0].shape[1 - dim]
    shape = (other, length) if dim else (length, other)
    other_half = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}.get(dtype)
    if device.type == "cpu" and any(part.dtype == other_half for part in parts):
        # torch converts between the two one number at a time; by way of float32 it is five times faster
        wide = _joined(parts, dim, torch.float32, device, workspace)
        return workspace.take(f"narrow {dim}", shape, dtype, device).copy_(wide)
    joined = workspace.take(f"stack {dim}", shape, dtype, device)
    if all((part.dtype, part.device) == (dtype, device) for part in parts):
        return torch.cat(parts, dim, out=joined)
    start = 0
    for part in parts:
        joined.narrow(dim, start, part.shape[dim]).copy_(part, non_blocking=True)
        start += part.shape[dim]
    return joined


def _power_of_two(value: float) -> float:
    return 2.0 ** math.floor(math.log2(value)) if value > 0 else 1.0


def fuse_layer(base: Tensor, terms: Sequence[Term], out: Tensor, workspace: Workspace | None = None) -> None:
    """Write round(base + Σ factor · ΔW) to `out`, in place, reading `base` only.

    Args:
        base: The untouched weight, (out, in) or (out, in, kh, kw).
        terms: What is added; their order does not matter beyond float32's own rounding.
        out: Of base's shape, dtype and device; may not share memory with it.
        workspace: Reused memory; those who fuse many layers give one.

    Raises:
        RuntimeError: torch's own, among them OutOfMemoryError.
    """
    workspace = workspace or Workspace()
    low_rank = [term for term in terms if is_low_rank(term.adapter)]
    dense = [term for term in terms if not is_low_rank(term.adapter)]
    if not dense and has_native_gemm(out.dtype, out.device.type) and out.is_contiguous() and base.is_contiguous():
        up, down, gain = stack(low_rank, out.dtype, out.device, workspace)
        torch.addmm(base.flatten(1), up, down, alpha=gain, out=out.flatten(1))
    elif not dense:
        _fuse_by_rows(base, stack(low_rank, torch.float32, out.device, workspace), out)
    else:
        out.copy_(_sum(base, low_rank, dense, workspace))


@functools.cache
def has_native_gemm(dtype: torch.dtype, device_type: str) -> bool:
    """Whether a GEMM in this dtype sums in float32 and is fast here.

    torch's fp16 GEMM on a CPU is about 80 times slower than the one in fp32, and so is bf16 without AVX512-BF16.
    """
    if dtype == torch.float32:
        return True
    if device_type != "cpu":
        return dtype in (torch.float16, torch.bfloat16)
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _fuse_by_rows(base: Tensor, stacked: Stack, out: Tensor) -> None:
    """Through a float32 scratch, some rows at a time: weights are never held twice in float32."""
    rows = max(1, SCRATCH_BYTES // (4 * stacked.down.shape[1]))
    for start in range(0, base.shape[0], rows):
        part = slice(start, start + rows)
        scratch = base[part].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        scratch.flatten(1).addmm_(stacked.up[part], stacked.down, alpha=stacked.gain)
        out[part].copy_(scratch)


def _sum(base: Tensor, low_rank: Sequence[Term], dense: Sequence[Term], workspace: Workspace) -> Tensor:
    """Sum base + Σ factor · ΔW in float32, a new tensor."""
    base32 = base.to(torch.float32)
    total = base32.clone(memory_format=torch.contiguous_format)
    for term in dense:
        total.add_(term.adapter.delta_weight(base32), alpha=term.factor)
    if low_rank:
        up, down, gain = stack(low_rank, torch.float32, base.device, workspace)
        total.flatten(1).addmm_(up, down, alpha=gain)
    return total


def fuse_layer_a1111(base: Tensor, terms: Sequence[Term], out: Tensor) -> None:
    """As the WebUI 1.10 does it: one LoRA after another in prompt order, rounded at every operation.

    For reproducing pictures made there bit for bit; arguments as `fuse_layer`.
    """
    out.copy_(base)
    for adapter, factor in terms:
        if is_low_rank(adapter):
            up, down, scale = adapter.factors()
            up, down = up.to(out.device, out.dtype), down.to(out.device, out.dtype)
            delta = (up @ down).reshape(out.shape) * scale * factor
        else:
            delta = adapter.delta_weight(out.to(torch.float32)).to(out.dtype) * factor
        out.copy_(out + delta)


def is_finite_for_sure(terms: Sequence[Term], base_peak: float, dtype: torch.dtype) -> bool:
    """Whether the bounds of the summands prove that no weight overflows, without looking at one.

    Args:
        terms: The summands.
        base_peak: An upper bound of max |W0|.
        dtype: What the weight is stored as.
    """
    peak = base_peak + sum(abs(factor) * adapter.bound() for adapter, factor in terms)
    return peak < torch.finfo(dtype).max / 2
