"""Whether a compiled block computes what the block did before."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.compile.forms import tensors_in

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""RMS of the difference in units of the RMS of what is expected, for each dtype.

A compiled block keeps float32 where an eager one rounds between operations, and both may multiply in TF32: the
differences that rounding makes are a tenth of these or less, those of another weight or shape far more.
"""


def disagreement(expected: Any, got: Any) -> str:
    """In what two results of a block differ by more than rounding: a clause, or ``""``."""
    pairs = list(zip(tensors_in(expected), tensors_in(got), strict=False))
    if len(pairs) != len(list(tensors_in(expected))) or len(pairs) != len(list(tensors_in(got))):
        return "another number of tensors comes out"
    return next(filter(None, (_differ(one, other) for one, other in pairs)), "")


def is_finite(result: Any) -> bool:
    """Whether all numbers of a block's result are finite; only then can another be compared with it."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(result))


def _differ(expected: Tensor, got: Tensor) -> str:
    if (expected.shape, expected.dtype) != (got.shape, got.dtype):
        return f"{tuple(got.shape)} in {got.dtype} comes out instead of {tuple(expected.shape)} in {expected.dtype}"
    scale = _rms(expected)
    difference = _rms(got.float() - expected.float()) / scale if scale else _rms(got)
    allowed = LARGEST_DIFFERENCE.get(expected.dtype, 0.0)
    if math.isnan(difference) or math.isinf(difference):
        return "NaN comes out"
    return f"its numbers are {difference:.1e} off, {allowed:g} is allowed" if difference > allowed else ""


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt()) if tensor.numel() else 0.0
