"""What a tool made, or would make: of every kind the same facts, and of LoRA files the error of each layer."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lib_lora.core.header import MEGABYTE
from lib_lora.core.saving import file_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import Tensor

    from lib_lora.core.saving import DiskSpace

WORST_SHOWN = 5


def shapes_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the meta device, for a preview; single numbers, such as alphas, stay."""
    return {name: tensor if tensor.numel() == 1 else tensor.to("meta") for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job wrote, or would write.

    Attributes:
        paths: The new files, or the new folder.
        size: Bytes of all of it.
        disk: The room that was looked for before the work.
        metadata: Texts in the header, of several files those of the first.
        notes: Sentences for the user.
        written: Whether it is there, or this is a preview.
        at_most: Whether a preview can not know the size, the ranks and the layers, which may be smaller and fewer; a
            note says why.
    """

    paths: tuple[Path, ...]
    size: int
    disk: DiskSpace
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    written: bool = True
    at_most: bool = False

    @property
    def path(self) -> Path:
        """The new file or folder; of several the first."""
        return self.paths[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return _plain({"path": self.path} | asdict(self))

    def size_text(self) -> str:
        """For people."""
        return f"{'at most ' if self.at_most else ''}{self.size / 1e6:,.2f} MB"

    def preview_lines(self) -> list[str]:
        """What only a preview tells."""
        if self.written:
            return []
        needed, free = (size / MEGABYTE for size in (self.disk.needed, self.disk.free))
        return [
            f"disk: {needed:,.1f} MB needed, {free:,.0f} MB free",
            f"metadata: {len(self.metadata)} texts (--json shows them)",
            "nothing was written",
        ]


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
        norm: ‖ΔW‖ (Frobenius) that was wanted, at strength 1 of the new file; in a preview 0.
        error: ‖ΔW - ΔW of the new file‖, the rounding to the file's dtype included; in a preview 0.
    """

    name: str
    rank_before: int
    rank: int
    norm: float = 0.0
    error: float = 0.0

    @property
    def relative(self) -> float:
        """Error in units of the norm; 0 where nothing was wanted."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True, kw_only=True)
class LoraOutcome(Outcome):
    """A LoRA file that a tool made.

    Attributes:
        base_model: The family it is for.
        dtype: Of its tensors.
        layers: In the order of the sources.
    """

    base_model: str
    dtype: str
    layers: tuple[LayerOutcome, ...]

    @property
    def ranks_before(self) -> dict[int, int]:
        """Rank of what it was made of → number of layers, ascending."""
        return dict(sorted(Counter(layer.rank_before for layer in self.layers).items()))

    @property
    def ranks(self) -> dict[int, int]:
        """Rank in the new file → number of layers, ascending."""
        return dict(sorted(Counter(layer.rank for layer in self.layers).items()))

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
        plain = super().to_dict() | {"ranks_before": self.ranks_before, "ranks": self.ranks}
        if not self.written:
            keys = ("name", "rank_before", "rank")
            return plain | {"layers": [{key: getattr(layer, key) for key in keys} for layer in self.layers]}
        layers = [asdict(layer) | {"relative_error": layer.relative} for layer in self.layers]
        return plain | {"relative_error": self.error, "layers": layers}

    def __str__(self) -> str:
        """For people."""
        lines = [
            f"{self.path}, {self.size_text()}, {self.dtype}, for {self.base_model}",
            f"ranks: {_counted(self.ranks)}, before: {_counted(self.ranks_before)}",
            *(self._error_lines() if self.written else ()),
            *self.notes,
            *self.preview_lines(),
        ]
        return "\n".join(lines)

    def _error_lines(self) -> list[str]:
        whole = f"error: {self.error:.2%} of the whole change" if self.error >= 5e-5 else f"error: {self.error:.1e}"
        return [whole, *(f"  {layer.relative:7.2%} {layer.name}" for layer in self.worst() if layer.relative >= 5e-3)]


@dataclass(frozen=True)
class LoraResult:
    """A LoRA file as it will be saved, or for a preview with tensors on the meta device.

    Attributes:
        limit: Why a preview can tell its layers, ranks and size at most; empty where it can tell them. For the others
            see `LoraOutcome`.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    base_model: str
    dtype: str
    layers: tuple[LayerOutcome, ...]
    notes: tuple[str, ...]
    limit: str = ""

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return file_size(self.path, self.tensors, self.metadata)

    def outcome(self, disk: DiskSpace, *, written: bool) -> LoraOutcome:
        """What to tell of it."""
        limit = "" if written else self.limit
        return LoraOutcome(
            paths=(self.path,),
            size=self.size,
            disk=disk,
            metadata=self.metadata,
            notes=(*self.notes, limit) if limit else self.notes,
            written=written,
            at_most=bool(limit),
            base_model=self.base_model,
            dtype=self.dtype,
            layers=self.layers,
        )


def _plain(value: Any) -> Any:
    """The same of what JSON has."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast("dict[str, Any]", value).items()}
    return [_plain(item) for item in cast("list[Any]", value)] if isinstance(value, list | tuple) else value


def _counted(ranks: Mapping[int, int]) -> str:
    return ", ".join(f"{rank} ({count} layers)" for rank, count in ranks.items())
