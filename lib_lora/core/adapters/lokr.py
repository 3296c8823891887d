"""LoKr: ΔW = (alpha / rank) · w1 ⊗ w2 (Kronecker), each whole or a product of factors, w2 with Tucker's core or not.

Sources: Edalati et al. 2022 (arXiv 2212.10650); LyCORIS `modules/lokr.py`, whose forward scales once (its offline
merge scales twice); PEFT writes the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.core.adapters.base import DenseAdapter, check_rank, fold_core, full_precision, norm, peak, scale_of
from lib_lora.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lib_lora.core.workspace import Workspace

ROLES = frozenset({f"lokr_{part}{tail}" for part in ("w1", "w2") for tail in ("", "_a", "_b")} | {"lokr_t2"})
EXTRA = frozenset({"alpha", "scale"})


class Part(NamedTuple):
    """One factor of the Kronecker product.

    Attributes:
        tensors: The whole, or its two factors, or its two factors and Tucker's core; in the file's dtype.
    """

    tensors: tuple[Tensor, ...]

    @property
    def rank(self) -> int | None:
        """What the two factors share, or None for a whole."""
        return self.tensors[1].shape[0] if len(self.tensors) > 1 else None

    def whole(self) -> Tensor:
        """float32, (rows, columns) or (rows, columns, kh, kw)."""
        if len(self.tensors) == 1:
            return self.tensors[0].float()
        a, b, *core = (tensor.float() for tensor in self.tensors)
        with full_precision(a.device):
            if core:
                return (a.t() @ fold_core(core[0], b)).view(a.shape[1], b.shape[1], *core[0].shape[2:])
            return (a @ b.flatten(1)).view(len(a), *b.shape[1:])

    def check(self) -> None:
        """Refuse factors that do not multiply.

        Raises:
            AdapterError: If one is empty, or they share no rank.
        """
        check_rank(*self.tensors)
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        if not _multiply(*shapes):
            raise AdapterError(f"the factors {', '.join(map(str, shapes))} share no rank")


def _multiply(a: tuple[int, ...], b: tuple[int, ...] | None = None, core: tuple[int, ...] | None = None) -> bool:
    """Whether these are the shapes of a whole, of two factors, or of two factors and Tucker's core."""
    if b is None:
        return True
    if core is None:
        return len(a) == 2 and len(b) in (2, 4) and a[1] == b[0]
    return len(a) == len(b) == 2 and len(core) == 4 and core[:2] == (a[0], b[0])


@dataclass(frozen=True, eq=False)
class LokrAdapter(DenseAdapter):
    """Kronecker product of a small and a larger matrix.

    Attributes:
        first: w1, (a, c).
        second: w2, (b, d) or (b, d, kh, kw); ΔW is (a·b, c·d[, kh, kw]).
        scale: alpha / rank; 1 if both are whole.

    Raises:
        AdapterError: If a part's factors share no rank, or w1 is no matrix.
    """

    first: Part
    second: Part
    scale: float

    algorithm = "LoKr"

    def __post_init__(self) -> None:
        if self._w1.ndim != 2 or self._w2.ndim not in (2, 4):
            raise AdapterError(f"w1 {tuple(self._w1.shape)} and w2 {tuple(self._w2.shape)} have no Kronecker product")

    @cached_property
    def _w1(self) -> Tensor:
        return self.first.whole()

    @cached_property
    def _w2(self) -> Tensor:
        return self.second.whole()

    @property
    def rank(self) -> int:
        """Rank of the factored part; of whole parts the smaller side of w2."""
        return self.second.rank or self.first.rank or min(self._w2.shape[0], self._w2.flatten(1).shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(a·b, c·d) or (a·b, c·d, kh, kw)."""
        (a, c), (b, d, *kernel) = self._w1.shape, self._w2.shape
        return (a * b, c * d, *kernel)

    def shape_text(self) -> str:
        """ΔW's shape, and of what it is the product."""
        return f"{self.shape} = {tuple(self._w1.shape)} ⊗ {tuple(self._w2.shape)}"

    def bound(self, base_peak: float = 1.0) -> float:
        """Largest number of w1 times largest number of w2: this bound is met."""
        return self._bound

    @cached_property
    def _bound(self) -> float:
        return abs(self.scale) * peak(self._w1) * peak(self._w2)

    def delta_norm(self) -> float:
        """‖ΔW‖ = |scale| · ‖w1‖ · ‖w2‖."""
        return abs(self.scale) * norm(self._w1) * norm(self._w2)

    def add_to(self, total: Tensor, base: Tensor, rows: slice, factor: float, workspace: Workspace) -> None:
        """Row i·b + j of ΔW is w1[i] ⊗ w2[j]: whole groups of b rows at once, a part of a group on either end."""
        w1 = (self._w1 * (factor * self.scale)).to(total.device)
        w2 = self._w2.flatten(1).to(total.device)
        height, start = len(w2), rows.start
        while start < rows.stop:
            group, offset = divmod(start, height)
            count = max(1, (rows.stop - start) // height) if offset == 0 else 1
            stop = min(rows.stop, (group + count) * height)
            part = total[start - rows.start : stop - rows.start]
            inner = w2[offset : offset + len(part) // count]
            view = part.view(count, len(inner), w1.shape[1], -1)
            view.addcmul_(w1[group : group + count, None, :, None], inner[None, :, None, :])
            start = stop


def load(tensors: Mapping[str, Tensor], default_alpha: float | None) -> LokrAdapter | None:
    """Read one layer's tensors as LoKr, or None if they are another algorithm's.

    Args:
        tensors: Role → tensor: ``lokr_w1`` (a, c) or ``lokr_w1_a`` (a, rank) and ``lokr_w1_b`` (rank, c);
            ``lokr_w2`` (b, d[, kh, kw]) or ``lokr_w2_a`` (b, rank) and ``lokr_w2_b`` (rank, d[·kh·kw]), or with
            ``lokr_t2`` (rank, rank, kh, kw) the factors (rank, b) and (rank, d).
        default_alpha: Alpha of a layer that has none, or None for its rank.

    Raises:
        AdapterError: If a part is missing or given twice, or its factors share no rank.
    """
    if not any(role.startswith("lokr_") for role in tensors) or not tensors.keys() <= ROLES | EXTRA:
        return None
    first, second = _part(tensors, "w1", ()), _part(tensors, "w2", ("lokr_t2",))
    first.check()
    second.check()
    rank = second.rank if second.rank is not None else first.rank
    return LokrAdapter(first, second, scale_of(tensors, rank, default_alpha))


def _part(tensors: Mapping[str, Tensor], name: str, core: tuple[str, ...]) -> Part:
    whole, factors = f"lokr_{name}", (f"lokr_{name}_a", f"lokr_{name}_b", *core)
    present = [role for role in (whole, *factors) if role in tensors]
    if present == [whole]:
        return Part((tensors[whole],))
    if present in ([*factors], [*factors[:2]]):
        return Part(tuple(tensors[role] for role in present))
    raise AdapterError(f"{whole} or {factors[0]} and {factors[1]} were expected, found: {', '.join(present) or 'none'}")
