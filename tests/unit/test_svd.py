"""Truncated decomposition of whole matrices, against LAPACK's complete one in float64."""

from __future__ import annotations

import pytest
import torch

from lib_lora.errors import AdapterError
from lib_lora.tools import svd
from lib_lora.tools.svd import clamped_like_kohya, truncated_dense

MOST_ERROR = 1.001
ROUNDING = 3e-6  # of the matrix's norm: sums in float32
RECIPE_ERROR = 1e-3  # vectors of values that lie close turn in float32


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (orthonormal(side, len(values), generator) for side in (rows, columns))
    return ((left * values) @ right.T).float()


def noise(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def power(count: int, exponent: float) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


def errors(matrix: torch.Tensor, rank: int) -> tuple[float, float, float]:
    """Our error, the least that is possible, and the matrix's norm."""
    factors = truncated_dense(matrix, rank)
    ours = torch.linalg.matrix_norm(matrix.double() - factors.scale * factors.up.double() @ factors.down.double())
    values = torch.linalg.svdvals(matrix.double())
    return ours.item(), torch.linalg.vector_norm(values[rank:]).item(), torch.linalg.vector_norm(values).item()


def assert_best(matrix: torch.Tensor, rank: int) -> None:
    ours, best, norm = errors(matrix, rank)
    assert ours <= MOST_ERROR * best + ROUNDING * norm


@pytest.mark.parametrize("shape", [(200, 200), (120, 500), (500, 120), (400, 450)])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("exponent", [0.1, 0.5, 1, 3])
def test_the_error_is_that_of_the_best_factors(shape, rank, exponent):
    assert_best(with_spectrum(*shape, power(min(shape), exponent)), rank)


@pytest.mark.parametrize("shape", [(200, 200), (400, 450)])
def test_the_error_is_that_of_the_best_factors_of_pure_noise(shape):
    assert_best(noise(*shape), 16)


@pytest.mark.parametrize("rank", [20, 24, 30])
def test_a_low_rank_update_under_noise_is_found(rank):
    low = with_spectrum(300, 400, power(24, 0.3))
    assert_best(low + 1e-5 * noise(300, 400), rank)


HARD = {
    "zero": torch.zeros(64, 80),
    "one": torch.ones(64, 80),
    "one number": torch.zeros(64, 80).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(2.0)),
    "unit": torch.eye(300),
    "rank 1": with_spectrum(300, 310, power(1, 1)),
    "rank 3": with_spectrum(300, 310, power(3, 1)),
    "rank 3, tall": with_spectrum(310, 300, power(3, 1)),
    "one row": noise(1, 50),
    "one column": noise(50, 1),
    "one by one": noise(1, 1),
    "equal values": with_spectrum(300, 300, torch.ones(300, dtype=torch.float64)),
    "two levels": with_spectrum(300, 310, torch.tensor([1.0] * 9 + [1e-4] * 291, dtype=torch.float64)),
    "condition 1e12": with_spectrum(300, 310, torch.logspace(0, -12, 300, dtype=torch.float64)),
    "condition 1e30": with_spectrum(100, 310, torch.logspace(0, -30, 100, dtype=torch.float64)),
    "huge": 1e30 * noise(300, 310),
    "tiny": 1e-30 * noise(300, 310),
    "denormal": 1e-40 * noise(300, 310),
    "rows alike": noise(1, 310).expand(300, 310).contiguous(),
    "rows of zeros": torch.cat((noise(20, 310), torch.zeros(280, 310))),
    "Hilbert": 1 / (torch.arange(300.0)[:, None] + torch.arange(310.0) + 1),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_matrices_are_decomposed(name):
    factors = truncated_dense(HARD[name], 8)
    assert factors.up.isfinite().all()
    assert factors.down.isfinite().all()
    assert_best(HARD[name], 8)


def test_there_are_twenty_hard_ones():
    assert len(HARD) == 20


def test_a_rank_beyond_the_matrix_gives_the_matrix():
    factors = truncated_dense(noise(12, 30), 4096)
    assert factors.up.shape == (12, 12)
    ours, best, norm = errors(noise(12, 30), 4096)
    assert (best, ours) == (0, pytest.approx(0, abs=ROUNDING * norm))


def test_the_same_matrix_gives_the_same_factors():
    first, second = (truncated_dense(with_spectrum(300, 310, power(300, 1)), 8) for _ in range(2))
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)


@pytest.fixture
def whole_decompositions(monkeypatch):
    """Sizes of the matrices whose eigenvectors are computed completely."""
    sizes: list[int] = []
    original = torch.linalg.eigh

    def counted(matrix):
        sizes.append(len(matrix))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    return sizes


def test_what_is_proven_is_not_decomposed_completely(whole_decompositions):
    truncated_dense(with_spectrum(300, 310, power(300, 1)), 8)
    assert 300 not in whole_decompositions


def test_what_can_not_be_proven_is_decomposed_completely(monkeypatch, whole_decompositions):
    monkeypatch.setattr(svd, "STEPS", 1)
    assert_best(noise(300, 310), 8)
    assert 300 in whole_decompositions


def test_one_step_alone_would_not_have_been_enough(monkeypatch):
    monkeypatch.setattr(svd, "STEPS", 1)
    monkeypatch.setattr(svd, "MOST_ERROR", 10.0)
    ours, best, _ = errors(noise(300, 310), 8)
    assert ours > MOST_ERROR * best


def raising(calls: int, original):
    """A function that does not converge the first `calls` times."""
    left = [calls]

    def function(*args, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise torch.linalg.LinAlgError("did not converge\nlong story")
        return original(*args, **options)

    return function


@pytest.mark.parametrize(("eigh", "svd_calls"), [(1, 0), (9, 0), (9, 1)])
def test_what_does_not_converge_is_tried_in_another_way(monkeypatch, eigh, svd_calls):
    matrix = with_spectrum(300, 310, power(300, 1))
    expected = truncated_dense(matrix, 8)
    monkeypatch.setattr(torch.linalg, "eigh", raising(eigh, torch.linalg.eigh))
    monkeypatch.setattr(torch.linalg, "svd", raising(svd_calls, torch.linalg.svd))
    found = truncated_dense(matrix, 8)
    assert torch.allclose(found.up @ found.down, expected.up @ expected.down, atol=ROUNDING)


def test_what_never_converges_is_told(monkeypatch):
    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, raising(99, None))
    with pytest.raises(AdapterError, match=r"singular values can not be computed: did not converge$"):
        truncated_dense(noise(300, 310), 8)


@pytest.mark.parametrize("quantile", [1.0, 0.99, 0.5])
@pytest.mark.parametrize("shape", [(24, 24), (24, 90), (90, 24)])
def test_clamped_factors_are_kohyas_recipe(shape, quantile):
    matrix, rank = noise(*shape), 4
    left, values, right = torch.linalg.svd(matrix)
    up, down = left[:, :rank] @ torch.diag(values[:rank]), right[:rank]
    limit = torch.quantile(torch.cat([up.flatten(), down.flatten()]), quantile)
    factors = clamped_like_kohya(matrix, rank, quantile)
    assert torch.allclose(factors.up, up.clamp(-limit, limit), atol=RECIPE_ERROR)
    assert torch.allclose(factors.down, down.clamp(-limit, limit), atol=RECIPE_ERROR)
