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
from lib_lora.core.adapters.base import exact_products, full_precision, matrix
from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.core.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

SCRATCH_BYTES = 4 << 20
"""Rows of a float32 scratch are taken in pieces of this size, which stay in the processor's cache."""
GPU_SCRATCH_BYTES = 64 << 20
"""The same on a GPU, where a piece must keep all of it busy."""
SMALL_ELEMENTS = 1 << 16
"""Factors of no more elements are joined in fresh memory: to look for a place in reused memory takes longer."""


class Term(NamedTuple):
    """One summand of a layer: factor · ΔW, the factor being all strengths in one number."""

    adapter: WeightAdapter
    factor: float


class Stack(NamedTuple):
    """Several low-rank updates of one layer as one: ΔW = gain · up @ down.

    Attributes:
        up: (out, Σ rank), with factors and scales folded in where they differ from term to term.
        down: (Σ rank, in·kh·kw).
        gain: What is common to them, which a GEMM applies in float32: a small alpha / rank can not underflow in fp16.

    Neither is to be written to: they may be the adapter's own.
    """

    up: Tensor
    down: Tensor
    gain: float


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
    down = _joined([low.down for low in factors], 0, dtype, device, workspace)
    ups = [low.up for low in factors]
    if scales.count(scales[0]) == len(scales):
        return Stack(_joined(ups, 1, dtype, device, workspace), down, scales[0])
    gain = common_gain(scales, dtype)
    up = _joined(ups, 1, torch.float32, device, workspace)
    each = [scale / gain for scale, low in zip(scales, ups, strict=True) for _ in range(low.shape[1])]
    up.mul_(torch.tensor(each, dtype=torch.float32, device=device))
    return Stack(up.to(dtype), down, gain)


def common_gain(scales: Sequence[float], dtype: torch.dtype) -> float:
    """What scales that are folded into factors of this dtype are divided by, and their product is multiplied by.

    A power of two, so that neither costs a bit, and 1 for types that underflow nowhere near.
    """
    return 1.0 if dtype != torch.float16 else _power_of_two(max(map(abs, scales)))


def _joined(parts: list[Tensor], dim: int, dtype: torch.dtype, device: torch.device, workspace: Workspace) -> Tensor:
    """Concatenate, converted on the way; large ones in reused memory. One alone may be given back as it is."""
    # torch converts between fp16 and bf16 one number at a time; by way of float32 it is five times faster
    other_half = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}.get(dtype)
    by_way = device.type == "cpu" and any(part.dtype == other_half for part in parts)
    if len(parts) == 1 and (parts[0].dtype, parts[0].device) == (dtype, device):
        return parts[0]
    if sum(part.numel() for part in parts) <= SMALL_ELEMENTS:
        small = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return (small.float() if by_way else small).to(device, dtype)
    length, other = sum(part.shape[dim] for part in parts), parts[0].shape[1 - dim]
    shape = (other, length) if dim else (length, other)
    if by_way:
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


def fuse_layer(
    base: Tensor, terms: Sequence[Term], out: Tensor, workspace: Workspace | None = None, seed: int | None = None
) -> None:
    """Write round(base + Σ factor · ΔW) to `out`, in place, reading `base` only.

    Args:
        base: The untouched parameter, (out, in), (out, in, kh, kw) or (out,), in out's dtype or a wider one.
        terms: What is added; their order does not matter beyond float32's own rounding.
        out: Of base's shape and device; may not share memory with it.
        workspace: Reused memory; those who fuse many layers give one.
        seed: For fp8: round up or down at random, by chance as near as the number is, from this seed; None rounds to
            the nearest.

    Raises:
        RuntimeError: torch's own, among them OutOfMemoryError.
    """
    if not terms:
        out.copy_(base)
        return
    workspace = workspace or Workspace()
    low_rank = [term for term in terms if is_low_rank(term.adapter)]
    dense = [term for term in terms if not is_low_rank(term.adapter)]
    as_one = has_native_gemm(out.dtype, out.device.type) and base.dtype == out.dtype
    if not dense and as_one and out.is_contiguous() and base.is_contiguous():
        up, down, gain = stack(low_rank, out.dtype, out.device, workspace)
        with exact_products(out.device):
            torch.addmm(base.flatten(1), up, down, alpha=gain, out=out.flatten(1))
    else:
        stacked = stack(low_rank, torch.float32, out.device, workspace) if low_rank else None
        with full_precision(out.device):
            _fuse_by_rows(base, stacked, dense, out, workspace, seed)


def prepared(adapter: WeightAdapter, out: Tensor) -> WeightAdapter:
    """The adapter with factors as `fuse_layer` takes them for `out`: of its device, and not to be converted again."""
    if not is_low_rank(adapter):
        return adapter
    up, down, scale = adapter.factors()
    dtype = out.dtype if has_native_gemm(out.dtype, out.device.type) else torch.float32
    up, down = (_joined([part], 0, dtype, out.device, Workspace()) for part in (up, down))
    return LoraAdapter(up, down, scale)


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


def _fuse_by_rows(
    base: Tensor, stacked: Stack | None, dense: Sequence[Term], out: Tensor, workspace: Workspace, seed: int | None
) -> None:
    """Sum in float32, some rows at a time, so that the sum stays in the processor's cache and takes no memory."""
    columns = out.numel() // len(out)
    in_place = out.dtype == torch.float32 and out.is_contiguous()
    generator = None if seed is None else torch.Generator(out.device).manual_seed(seed)
    step = math.lcm(*(term.adapter.row_step for term in dense))
    for rows in _pieces(slice(0, len(out)), step, columns, out.device):
        shape = (rows.stop - rows.start, columns)
        total = matrix(out[rows]) if in_place else workspace.take("rows", shape, torch.float32, out.device)
        total.copy_(matrix(base[rows]))
        if stacked is not None:
            total.addmm_(stacked.up[rows], stacked.down, alpha=stacked.gain)
        for term in dense:
            _add(term, total, base, rows, workspace)
        if not in_place:
            rounded = total if generator is None else round_stochastically(total, out.dtype, generator)
            out[rows].copy_(rounded.view(out[rows].shape))


def _add(term: Term, total: Tensor, base: Tensor, rows: slice, workspace: Workspace) -> None:
    """One summand; in pieces where another one needs all rows at once, so that its own scratch stays small."""
    for part in _pieces(rows, term.adapter.row_step, total.shape[1], total.device):
        own = slice(part.start - rows.start, part.stop - rows.start)
        term.adapter.add_to(total[own], base, part, term.factor, workspace)


def _pieces(rows: slice, step: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Rows in whole steps that fit the scratch; all of them at once if the step is 0."""
    scratch = SCRATCH_BYTES if device.type == "cpu" else GPU_SCRATCH_BYTES
    height = step * max(1, scratch // (4 * columns * step)) if step else rows.stop - rows.start
    for start in range(rows.start, rows.stop, height):
        yield slice(start, min(start + height, rows.stop))


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round to one of the two fp8 neighbours of each number, the nearer one with the higher chance.

    The mean of many roundings is the number itself, so a change smaller than a step is not lost everywhere.

    Args:
        values: float32; beyond the largest fp8 number they are cut to it.
        dtype: An fp8 type.
        generator: Makes the result repeatable.

    Returns:
        float32 numbers that the type can hold.
    """
    info = torch.finfo(dtype)
    _, exponents = torch.frexp(values)  # values = mantissa · 2^exponent with mantissa in [0.5, 1)
    smallest = math.frexp(info.tiny)[1]
    steps = torch.ldexp(torch.full_like(values, info.eps / 2), exponents.clamp(min=smallest))
    chance = torch.empty_like(values).uniform_(generator=generator)
    count = values / steps
    below = torch.floor(count)
    # the sum count + chance would be rounded itself, and now and then lift a number that the type holds exactly
    return ((below + (chance < count - below)) * steps).clamp(info.min, info.max)


def is_finite_for_sure(terms: Sequence[Term], base_peak: float, dtype: torch.dtype) -> bool:
    """Whether the bounds of the summands prove that no weight overflows, without looking at one.

    Args:
        terms: The summands.
        base_peak: An upper bound of max |W0|.
        dtype: What the weight is stored as.
    """
    return fits(largest_sum(terms, base_peak), dtype)


def largest_sum(terms: Sequence[Term], base_peak: float) -> float:
    """An upper bound of max |W0 + Σ factor · ΔW|; not finite if a number of an adapter is not."""
    return base_peak + sum(abs(factor) * adapter.bound(base_peak) for adapter, factor in terms)


def fits(peak: float, dtype: torch.dtype) -> bool:
    """Whether numbers up to `peak` are stored as finite ones."""
    return peak < torch.finfo(dtype).max / 2
