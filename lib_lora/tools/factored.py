"""Low-rank updates as two thin factors: sums, the best truncation, distances and rounding, without forming ΔW."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lib_lora.core.adapters import Factors, is_low_rank
from lib_lora.core.adapters.base import fold_core, matrix
from lib_lora.core.adapters.loha import LohaAdapter
from lib_lora.core.adapters.lokr import LokrAdapter
from lib_lora.core.norms import factors_norm
from lib_lora.errors import AdapterError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lib_lora.core.adapters import WeightAdapter
    from lib_lora.core.adapters.lokr import Part

# They have no types.
_linalg: Any = torch.linalg
_pad: Any = torch.nn.functional.pad
JITTER = 1e-8
"""Part of the largest number that is added to a matrix whose singular values do not converge."""


class Truncation(NamedTuple):
    """The best approximation of a matrix by one of lower rank (Eckart and Young).

    Attributes:
        factors: Of the approximation, in float32 or float64; its scale is 1.
        norm: ‖M‖ (Frobenius) of the whole matrix.
        lost: ‖M - approximation‖.
    """

    factors: Factors
    norm: float
    lost: float


class StoredLayer(NamedTuple):
    """A layer as a file will hold it: ΔW = alpha / rank · up @ down.

    Attributes:
        up: (out, rank), in the file's dtype.
        down: (rank, in·kh·kw), in the file's dtype.
        alpha: One number, in the file's dtype.
    """

    up: Tensor
    down: Tensor
    alpha: Tensor

    @property
    def rank(self) -> int:
        """Number of columns of `up`."""
        return self.up.shape[1]

    def factors(self) -> Factors:
        """What a reader of the file makes of it."""
        return Factors(self.up, self.down, self.alpha.item() / self.rank)

    def tensors(self, name: str, shape: Sequence[int]) -> dict[str, Tensor]:
        """By kohya's keys.

        Args:
            name: What they begin with.
            shape: Of the weight, (out, in) or (out, in, kh, kw).
        """
        return {
            f"{name}.lora_up.weight": self.up.reshape(shape[0], self.rank, *(1,) * len(shape[2:])),
            f"{name}.lora_down.weight": self.down.reshape(self.rank, *shape[1:]),
            f"{name}.alpha": self.alpha,
        }


def exact_factors(adapter: WeightAdapter) -> Factors | None:
    """The factors of an update that is a product of thin matrices, or None if it is none.

    LoHa has r² of them, for (u1 u2ᵀ) ⊙ (v1 v2ᵀ) = (u1 ⊙ v1)(u2 ⊙ v2)ᵀ; LoKr has the Kronecker products of those of
    its parts, if the second one is factored.
    """
    if is_low_rank(adapter):
        return adapter.factors()
    if isinstance(adapter, LohaAdapter):
        (up1, down1), (up2, down2) = adapter.first.factors(), adapter.second.factors()
        up = (up1.float()[:, :, None] * up2.float()[:, None, :]).flatten(1)
        return Factors(up, (down1.float()[:, None] * down2.float()[None]).flatten(0, 1), adapter.scale)
    if isinstance(adapter, LokrAdapter) and adapter.second.rank is not None:
        (up1, down1), (up2, down2) = _part_factors(adapter.first), _part_factors(adapter.second)
        return Factors(torch.kron(up1, up2), torch.kron(down1, down2), adapter.scale)
    return None


def exact_rank(adapter: WeightAdapter) -> int | None:
    """The rank of `exact_factors`, without making them."""
    if is_low_rank(adapter):
        return adapter.rank
    if isinstance(adapter, LohaAdapter):
        return len(adapter.first.down) * len(adapter.second.down)
    if isinstance(adapter, LokrAdapter) and adapter.second.rank is not None:
        return (adapter.first.rank or min(adapter.first.tensors[0].shape)) * adapter.second.rank
    return None


def without_numbers(sides: Sequence[int], rank: int, dtype: torch.dtype, *, scale: float = 1.0) -> StoredLayer:
    """What `stored` makes of an update of this rank, on the meta device, for a preview.

    Args:
        sides: (out, in·kh·kw).
        rank: Of the layer.
        dtype: Of all tensors of the file.
        scale: alpha / rank, where the file says what it is.
    """
    # No arithmetic: the first one on the meta device makes torch load a second's worth of modules.
    up, down = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((sides[0], rank), (rank, sides[1])))
    return StoredLayer(up, down, _stored_alpha(scale * rank, rank, scale, dtype))


def _part_factors(part: Part) -> tuple[Tensor, Tensor]:
    """(rows, rank) and (rank, columns·kh·kw) in float32; a whole part beside a unit matrix."""
    if part.rank is None:
        return _beside_unit(matrix(part.whole()))
    up, down, *core = (tensor.float() for tensor in part.tensors)
    return (up.t().contiguous(), fold_core(core[0], down)) if core else (up, down.flatten(1))


def _beside_unit(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    return (torch.eye(rows), weight) if rows <= columns else (weight, torch.eye(columns))


def stacked(terms: Sequence[tuple[Factors, float]]) -> Factors:
    """Σ factor · ΔW as one update whose rank is the sum of the ranks.

    Args:
        terms: At least one; factors of one shape in any floating dtype, and a number, whose sign goes into `up`.

    Returns:
        float64 if any of them is wider than half precision, else float32; the scale is 1.
    """
    wide = any(max(low.up.element_size(), low.down.element_size()) > 2 for low, _ in terms)
    dtype = torch.float64 if wide else torch.float32
    ups = [low.up.to(dtype) * (low.scale * factor) for low, factor in terms]
    downs = [low.down.to(dtype) for low, _ in terms]
    return Factors(torch.cat(ups, 1), torch.cat(downs), 1.0) if len(terms) > 1 else Factors(ups[0], downs[0], 1.0)


def truncated(factors: Factors, rank_of: Callable[[Tensor], int]) -> Truncation:
    """The best approximation of scale · up @ down by a matrix of lower rank.

    QR of both factors, and the singular values of the small product of the two triangles: the work is that of the
    factors' size, whatever the size of ΔW is.

    Args:
        factors: up (out, rank), down (rank, in·kh·kw), float32 or float64.
        rank_of: Singular values in descending order → how many of them are kept; what is missing at more than there
            are, is filled with zeros.

    Raises:
        AdapterError: If the singular values can not be computed.
    """
    left, right = _Orthogonal.of(factors.up), _Orthogonal.of(factors.down.t())
    u, values, vh = small_svd(left.triangle @ right.triangle.t() * factors.scale)
    rank = rank_of(values)
    missing = [0, max(0, rank - len(values))]
    up = _pad(left.times(u[:, :rank] * values[:rank]), missing)
    down = _pad(right.times(vh[:rank].t()), missing).t()
    norm, lost = (_linalg.vector_norm(part, dtype=torch.float64).item() for part in (values, values[rank:]))
    return Truncation(Factors(up, down, 1.0), norm, lost)


class _Orthogonal(NamedTuple):
    """Q and R of a matrix, Q as LAPACK's reflectors: it is multiplied with few columns only, and never formed."""

    reflectors: Tensor
    tau: Tensor
    triangle: Tensor

    @classmethod
    def of(cls, thin: Tensor) -> _Orthogonal:
        reflectors, tau = torch.geqrf(thin)
        size = len(tau)
        return cls(reflectors[:, :size], tau, reflectors[:size].triu())

    def times(self, columns: Tensor) -> Tensor:
        """Q @ columns."""
        rows = len(self.reflectors) - len(columns)
        return torch.ormqr(self.reflectors, self.tau, torch.cat((columns, columns.new_zeros(rows, columns.shape[1]))))


def small_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values, Vᵀ of a small matrix; where they do not converge, once more in float64 and slightly moved.

    Raises:
        AdapterError: If they do not converge then either, as with NaN.
    """
    try:
        return _linalg.svd(core, full_matrices=False)
    except _linalg.LinAlgError:
        moved = core.double()
        noise = torch.randn(moved.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        parts = _linalg.svd(moved + noise * (JITTER * moved.abs().max()), full_matrices=False)
    except _linalg.LinAlgError as error:
        raise AdapterError(f"its singular values can not be computed: {str(error).splitlines()[0]}") from error
    u, values, vh = (part.to(core.dtype) for part in parts)
    return u, values, vh


def distance(one: Factors, other: Factors) -> float:
    """‖ΔW1 - ΔW2‖ (Frobenius) of two updates of one shape, in float64.

    Of two that are nearly the same component by component, the small difference itself is computed: a difference of
    two large norms could not tell it from rounding.
    """
    up1, up2 = one.up.double() * one.scale, other.up.double() * other.scale
    down1, down2 = one.down.double(), other.down.double()
    if up1.shape != up2.shape:
        return factors_norm(Factors(torch.cat((up1, -up2), 1), torch.cat((down1, down2)), 1.0))
    if torch.equal(down1, down2):
        return factors_norm(Factors(up1 - up2, down1, 1.0))
    return factors_norm(Factors(torch.cat((up1 - up2, up2), 1), torch.cat((down1, down1 - down2)), 1.0))


def balanced(factors: Factors) -> Factors:
    """The same update with both factors of each component about equally large, so that neither underflows in fp16.

    Only powers of two move from one to the other: no digit is lost.
    """
    up, down = factors.up, factors.down
    sizes = up.abs().amax(0), down.abs().amax(1)
    shift = torch.where(sizes[0] * sizes[1] > 0, (sizes[1] / sizes[0]).log2() / 2, 0.0).round()
    return Factors(torch.ldexp(up, shift), torch.ldexp(down, -shift[:, None]), factors.scale)


def storage_dtype(*tensors: Tensor) -> torch.dtype:
    """What holds the numbers of all `tensors`: the widest of their dtypes, fp16 for 8-bit ones."""
    dtypes = [tensor.dtype if tensor.element_size() > 1 else torch.float16 for tensor in tensors]
    return functools.reduce(torch.promote_types, dtypes)


def check_finite(layer: str, kept: StoredLayer) -> None:
    """Refuse numbers that the file's dtype can not hold.

    Raises:
        NonFiniteError: If one is not finite.
    """
    if not (kept.up.isfinite().all() and kept.down.isfinite().all()):
        kind = str(kept.up.dtype).removeprefix("torch.")
        raise NonFiniteError(f"layer {layer} has numbers beyond {kind}; save it with --save-precision float or bf16")


def stored(factors: Factors, dtype: torch.dtype, alpha: float | None = None) -> StoredLayer:
    """Round an update to what a file holds; what alpha loses in a narrow dtype is folded into `up`.

    Args:
        factors: In float32 or float64.
        dtype: Of all tensors of the file.
        alpha: What the file is to say; None stands for the rank. If `dtype` can not hold it, it is the rank too.
    """
    rank = factors.up.shape[1]
    kept = _stored_alpha(rank if alpha is None else alpha, rank, factors.scale, dtype)
    ratio = factors.scale * rank / kept.item() if kept != 0 else 1.0
    return StoredLayer((factors.up * ratio).to(dtype), factors.down.to(dtype), kept)


def _stored_alpha(alpha: float, rank: int, scale: float, dtype: torch.dtype) -> Tensor:
    kept = torch.tensor(alpha, dtype=dtype)
    if not math.isfinite(kept.item()) or (kept == 0 and scale != 0):
        return torch.tensor(rank, dtype=dtype)
    return kept
