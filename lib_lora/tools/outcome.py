"""What a tool made of LoRA files, layer by layer, with the error of each."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

WORST_SHOWN = 5


def dtype_name(dtypes: Iterable[torch.dtype]) -> str:
    """Names of the dtypes that occur, such as ``float16``."""
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


@dataclass(frozen=True)
class LayerOutcome:
    """One layer.

    Attributes:
        name: As in `naming`: ``component:path``.
        rank_before: Rank of what it was made of, all of it together.
        rank: Rank in the new file.
        norm: ‖ΔW‖ (Frobenius) that was wanted, at strength 1 of the new file.
        error: ‖ΔW - ΔW of the new file‖, the rounding to the file's dtype included.
    """

    name: str
    rank_before: int
    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """Error in units of the norm; 0 where nothing was wanted."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class LoraOutcome:
    """A LoRA file that a tool made.

    Attributes:
        path: Where it is.
        size: Bytes.
        base_model: The family it is for.
        dtype: Of its tensors.
        layers: In the order of the sources.
        notes: Sentences for the user.
    """

    path: Path
    size: int
    base_model: str
    dtype: str
    layers: tuple[LayerOutcome, ...]
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """√Σ error² in units of √Σ norm², over all layers."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.error for layer in self.layers)) / norm if norm else 0.0

    def worst(self) -> list[LayerOutcome]:
        """The layers with the largest relative error, the largest first."""
        return sorted(self.layers, key=lambda layer: -layer.relative)[:WORST_SHOWN]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        layers = [asdict(layer) | {"relative_error": layer.relative} for layer in self.layers]
        return asdict(self) | {"path": str(self.path), "relative_error": self.error, "layers": layers}

    def __str__(self) -> str:
        """For people."""
        ranks = Counter(layer.rank for layer in self.layers)
        lines = [
            f"{self.path}, {self.size / 1e6:.2f} MB, {self.dtype}, for {self.base_model}",
            f"ranks: {', '.join(f'{rank} ({count} layers)' for rank, count in sorted(ranks.items()))}",
            f"error: {self.error:.2%} of the whole change" if self.error >= 5e-5 else f"error: {self.error:.1e}",
            *(f"  {layer.relative:7.2%} {layer.name}" for layer in self.worst() if layer.relative >= 5e-3),
            *self.notes,
        ]
        return "\n".join(lines)
