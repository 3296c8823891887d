"""The best approximation of a matrix by one of low rank: fast, and proven to be that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.adapters import Factors
from lib_lora.tools.factored import small_svd

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_linalg: Any = torch.linalg  # has no types
MOST_ERROR = 1.001
"""‖A - up @ down‖ is at most this times that of the best factors of the rank."""
OVERSAMPLING = 8
STEPS, ATTEMPTS = 4, 2
"""How often the Krylov space grows before it is tried, and how often it is."""
SEED = 0
GRAM_PARTS = 4
_GRAM_PART = 0.625
"""Of the whole product that is multiplied."""
_SPACE, _ALL = 24, 60
"""Of the smaller side squared times the vectors, and cubed: the rest's time in that of products, measured."""
# Of ‖A‖² · eps. What rounding adds to A Aᵀ, in the spectral norm, is 0.14 of it at most for matrices of many kinds.
ROUNDING = 4.0


def no_tick() -> None:
    """Nobody wants to end it."""


def truncated_dense(matrix: Tensor, rank: int, tick: Callable[[], None] = no_tick) -> Factors:
    """The up and down of the rank with the least ‖matrix - up @ down‖ (Frobenius), but for `MOST_ERROR`.

    The vectors of the smaller side are those of the largest eigenvalues of A Aᵀ. Nothing of the larger side's square
    is formed, and of the smaller side's all eigenvectors are computed only if a few can not be proven to be enough.

    Args:
        matrix: (out, in) float32, finite.
        rank: At least 1; more than min(out, in) counts as that.
        tick: Called between steps; what it raises passes through.

    Returns:
        float32 on the matrix's device; the scale is 1, and the factor of the smaller side is orthonormal.

    Raises:
        AdapterError: If the singular values can not be computed.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    # The squares of numbers up to 1 neither overflow nor vanish.
    size = wide.abs().amax().clamp_min(torch.finfo(wide.dtype).tiny)
    left = _leading_left(wide / size, min(rank, len(wide)), tick)
    right = left.t() @ wide
    return Factors(left, right, 1.0) if wide is matrix else Factors(right.t(), left.t(), 1.0)


def clamped_like_kohya(matrix: Tensor, rank: int, quantile: float) -> Factors:
    """The factors up = U S and down = Vᵀ, both cut off at a quantile of all their values, as kohya's scripts do.

    The quantile is that of the signed values, so that the result depends on the signs that LAPACK gives the vectors:
    hence a decomposition of its own, on the CPU. It is not the best approximation.

    Args:
        matrix: (out, in) float32, finite.
        rank: See `truncated_dense`.
        quantile: In (0, 1]; kohya's is 0.99.

    Raises:
        AdapterError: See `truncated_dense`.
    """
    left, values, right = (part.to(matrix.device) for part in small_svd(matrix.cpu()))
    up, down = left[:, :rank] * values[:rank], right[:rank]
    limit = _quantile(torch.cat((up.flatten(), down.flatten())), quantile)
    return Factors(up.clamp(-limit, limit), down.clamp(-limit, limit), 1.0)


def _quantile(values: Tensor, quantile: float) -> float:
    """`torch.quantile`, which takes 16 million values at most."""
    ordered = values.sort().values
    place = quantile * (len(ordered) - 1)
    below, above = ordered[int(place)].item(), ordered[min(int(place) + 1, len(ordered) - 1)].item()
    return below + (place - int(place)) * (above - below)


def decomposition_flops(out: int, columns: int, rank: int) -> int:
    """About what `truncated_dense` takes, counted as products of matrices in float32 that take as long."""
    small, large = min(out, columns), max(out, columns)
    if _is_thin(rank, small):
        return int(2 * _GRAM_PART * small**2 * large + _SPACE * small**2 * (rank + OVERSAMPLING))
    return int(4 * _GRAM_PART * small**2 * large + _ALL * small**3)


def _is_thin(rank: int, small: int) -> bool:
    """Whether the Krylov space costs less than the whole."""
    return 2 * (rank + OVERSAMPLING) * STEPS * ATTEMPTS <= small


def _leading_left(matrix: Tensor, rank: int, tick: Callable[[], None]) -> Tensor:
    """The left singular vectors of the largest values, (out, rank), of a matrix with out ≤ in."""
    try:
        return _leading_eigenvectors(matrix, rank, tick).to(matrix.dtype)
    except _linalg.LinAlgError:
        return small_svd(matrix.cpu().double())[0][:, :rank].to(matrix)


def _leading_eigenvectors(matrix: Tensor, rank: int, tick: Callable[[], None]) -> Tensor:
    if _is_thin(rank, len(matrix)):
        for dtype in (torch.float32, torch.float64):
            vectors = _proven_eigenvectors(_gram(matrix.to(dtype), tick), rank, tick)
            if vectors is not None:
                return vectors
    return _linalg.eigh(_gram(matrix.double(), tick)).eigenvectors[:, -rank:]


def _gram(matrix: Tensor, tick: Callable[[], None]) -> Tensor:
    """A Aᵀ, of which little more than the lower triangle is multiplied."""
    gram = matrix.new_zeros(len(matrix), len(matrix))
    end = 0
    for rows in matrix.chunk(GRAM_PARTS):
        begin, end = end, end + len(rows)
        gram[begin:end, :end] = rows @ matrix[:end].t()
        tick()
    return gram.tril() + gram.tril(-1).t()


def _proven_eigenvectors(gram: Tensor, rank: int, tick: Callable[[], None]) -> Tensor | None:
    """Vectors of the largest eigenvalues of G, or None if none are found that are proven to be good enough.

    They are sought in a block Krylov space. Source: Musco and Musco, Randomized Block Krylov Methods for Stronger and
    Faster Approximate Singular Value Decomposition, 2015.
    """
    generator = torch.Generator().manual_seed(SEED)
    block = torch.randn(len(gram), rank + OVERSAMPLING, generator=generator).to(gram)
    blocks: list[Tensor] = []
    for _ in range(ATTEMPTS):
        for _ in range(STEPS):
            block = _linalg.qr(gram @ block).Q
            blocks.append(block)
            tick()
        basis = _linalg.qr(torch.cat(blocks, 1)).Q
        values, rotation = _linalg.eigh(basis.t() @ (gram @ basis))
        vectors = basis @ rotation[:, -rank:]
        tick()
        if _is_proven(gram, values[-rank:], vectors):
            return vectors
    return None


def _is_proven(gram: Tensor, values: Tensor, vectors: Tensor) -> bool:
    """Whether Ritz values θ, ascending, and vectors V of G are as good as `MOST_ERROR` asks for.

    If G ≤ τI + V diag(s) Vᵀ for some s ≥ 0, then the largest eigenvalues of G add up to rank · τ + Σs at most (Ky Fan
    1949), and V misses no more than that less Σθ. τ and s are chosen so that this is what is allowed, and a Cholesky
    factorisation tells whether the inequality holds.
    """
    whole = gram.diagonal().double().sum().item()
    missed = whole - values.double().sum().item()
    slack = missed * (1 - MOST_ERROR**-2) / len(values)
    above = values - values[0] + slack / 2
    least = values[0].item() + slack / 2 - ROUNDING * torch.finfo(gram.dtype).eps * whole
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    difference = torch.addmm(least * unit - gram, vectors * above, vectors.t())
    return _linalg.cholesky_ex(difference).info.item() == 0
