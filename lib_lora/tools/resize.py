"""Another rank for a LoRA: the best approximation of each layer's up @ down, in the keys and the layout of its file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lib_lora.core.adapters import Factors
from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.core.files import read_lora_file
from lib_lora.core.naming import BIAS, PIPELINE_PARTS, split_key
from lib_lora.core.network import network_from_file
from lib_lora.core.norms import factors_norm
from lib_lora.core.peft_settings import PEFT_SETTINGS, Rank, peft_settings
from lib_lora.core.saving import FLOPS_PER_BYTE, check_output, no_progress, save_tensors
from lib_lora.errors import AdapterError, JobError
from lib_lora.tools.factored import (
    Truncation,
    balanced,
    check_finite,
    distance,
    stacked,
    storage_dtype,
    stored,
    truncated,
    without_numbers,
)
from lib_lora.tools.metadata import lora_metadata
from lib_lora.tools.outcome import LayerOutcome, LoraOutcome, LoraResult, dtype_name
from lib_lora.tools.ranks import RANKS_AT_MOST
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from lib_lora.core.files import LoraFile
    from lib_lora.core.network import Network
    from lib_lora.core.saving import Progress
    from lib_lora.tools.factored import StoredLayer
    from lib_lora.tools.ranks import RankRule

    _Made: TypeAlias = "tuple[Mapping[str, Tensor], LayerOutcome]"

_PEFT_UP = ".lora_B.weight"
_FOLDED = ("lora_mid", "scale")
"""Tucker's core is folded into `down`, a scale of its own into alpha or `up`."""
_PRODUCTS = 10
"""Of two thin factors' columns, in float32, that a layer takes in all."""
_SCALES = {"alpha", "scale"}


@dataclass(frozen=True)
class _Layer:
    """One layer of a file.

    Attributes:
        name: As in `naming`.
        adapter: What it does.
        keys: Role → key.
        bias: Key of PEFT's bias, which is scaled as the layer is, or None.
    """

    name: str
    adapter: LoraAdapter
    keys: Mapping[str, str]
    bias: str | None

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in·kh·kw)."""
        return self.adapter.shape[0], math.prod(self.adapter.shape[1:])

    def tensors(self, kept: StoredLayer) -> dict[str, Tensor]:
        """By the file's own keys, which may have no alpha."""
        ones = (1,) * (len(self.adapter.shape) - 2)
        up, down = kept.up.view(-1, kept.rank, *ones), kept.down.view(kept.rank, *self.adapter.shape[1:])
        made = {self.keys["lora_up"]: up, self.keys["lora_down"]: down}
        return made | ({self.keys["alpha"]: kept.alpha} if "alpha" in self.keys else {})


def resize(
    lora: Path,
    out: Path,
    rule: RankRule,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    preview: bool = False,
    progress: Progress = no_progress,
) -> LoraOutcome:
    """Write a LoRA with other ranks; alpha / rank stays what it was.

    Layers without LoRA's factors (LoHa, DoRA, biases, …) and those whose rank is small enough already are kept.

    Args:
        lora: A LoRA file in any layout.
        out: The file to be.
        rule: The ranks.
        dtype: Of all tensors; None for each layer's own.
        overwrite: Whether an older file is replaced.
        preview: Whether all is checked, and nothing is calculated or written.
        progress: Told the work done, in about bytes.

    Raises:
        FileError: If a file can not be read or written.
        NamingError, AdapterError: If the file is no good LoRA.
        NonFiniteError: If it holds NaN, or its new numbers do not fit `dtype`.
        JobError: If it has no layers with factors, or PEFT's settings scale others that it has.
    """
    check_output(out, overwrite=overwrite)
    work = Work(progress)
    file = read_lora_file(lora)
    network = network_from_file(file)
    layers = _layers(file, network)
    job = _Job(file, network, layers, out, rule, dtype, _notes(file, network, layers))
    planned = job.result([_planned(layer, rule, dtype) for layer in layers])
    disk = check_output(out, planned.size, overwrite=overwrite)
    if preview:
        return planned.outcome(disk, written=False)
    work.expect(file.identity.size + sum(map(_cost, layers)) + 2 * planned.size)
    work.add(file.identity.size)
    made: list[_Made] = []
    for layer in layers:
        made.append(_resized(layer, rule, dtype))
        work.add(_cost(layer))
    result = job.result(made, work.stage(planned.size))
    save_tensors(out, result.tensors, result.metadata, overwrite=overwrite, progress=work.stage(planned.size))
    return result.outcome(disk, written=True)


class _Job(NamedTuple):
    """What `resize` was asked for, and what it found in the file."""

    file: LoraFile
    network: Network
    layers: Sequence[_Layer]
    out: Path
    rule: RankRule
    dtype: torch.dtype | None
    notes: tuple[str, ...]

    def result(self, made: Sequence[_Made], progress: Progress = no_progress) -> LoraResult:
        """The whole file of its new layers; `progress` is told the bytes that are hashed."""
        tensors = {key: _as(tensor, self.dtype) for key, tensor in self.file.tensors.items()}
        for layer, (new, _) in zip(self.layers, made, strict=True):
            for role in _FOLDED if new else ():
                tensors.pop(layer.keys.get(role, ""), None)
            if new and layer.bias and "alpha" not in layer.keys:
                tensors[layer.bias] = tensors[layer.bias] * layer.adapter.scale
            tensors |= new
        outcomes = tuple(outcome for _, outcome in made)
        return LoraResult(
            path=self.out,
            tensors=tensors,
            metadata=self._metadata(tensors, outcomes, progress),
            base_model=self.network.base_model.value,
            dtype=dtype_name(tensors[layer.keys["lora_up"]].dtype for layer in self.layers),
            layers=outcomes,
            notes=self.notes,
            limit=RANKS_AT_MOST if self.rule.depends_on_values else "",
        )

    def _metadata(
        self, tensors: Mapping[str, Tensor], outcomes: Sequence[LayerOutcome], progress: Progress
    ) -> dict[str, str]:
        said = dict(self.file.metadata) | {"ss_training_comment": _comment(self.file, self.rule, self.network)}
        title, family = self.out.stem, self.network.base_model
        made = lora_metadata(tensors, said, family=family, title=title, progress=progress)
        return made | _settings(self.layers, outcomes)


def _layers(file: LoraFile, network: Network) -> list[_Layer]:
    keys: dict[str, dict[str, str]] = {}
    for key in file.tensors:
        if parts := split_key(key):
            keys.setdefault(parts.layer, {})[parts.role] = key
    return [
        _Layer(name, adapter, keys[name], keys.get(name + BIAS, {}).get("lora_bias"))
        for name, adapter in network.adapters.items()
        if isinstance(adapter, LoraAdapter)
    ]


def _cost(layer: _Layer) -> int:
    """Units of `Work`: products of thin factors, and their singular values."""
    return _PRODUCTS * sum(layer.sides) * layer.adapter.rank**2 // FLOPS_PER_BYTE


def _notes(file: LoraFile, network: Network, layers: Sequence[_Layer]) -> tuple[str, ...]:
    """What is not resized.

    Raises:
        JobError: If nothing is, or what is kept depends on settings that can not be kept.
    """
    name, others = file.path.name, {layer for layer in network.adapters if not layer.endswith(BIAS)}
    others -= {layer.name for layer in layers}
    if not layers:
        raise JobError(f"{name} has no layers with LoRA's factors, its algorithm is {network.algorithm}")
    if others and PEFT_SETTINGS in file.metadata:
        raise JobError(f"{name} mixes LoRA with {len(others)} other layers, of which PEFT's settings give the scale")
    return (f"{len(others)} layers have no LoRA factors and were kept as they are",) if others else ()


def _settings(layers: Sequence[_Layer], outcomes: Sequence[LayerOutcome]) -> dict[str, str]:
    """PEFT's settings for a file of diffusers: every alpha is the rank, for what it said is folded into `up`."""
    names = [layer.keys["lora_up"].removesuffix(_PEFT_UP) for layer in layers if "alpha" not in layer.keys]
    parts = {name.partition(".")[0] for name in names}
    if len(names) < len(layers) or not parts <= set(PIPELINE_PARTS.values()):
        return {}
    ranks = [Rank(outcome.rank, float(outcome.rank)) for outcome in outcomes]
    return {PEFT_SETTINGS: peft_settings(dict(zip(names, ranks, strict=True)))}


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _planned(layer: _Layer, rule: RankRule, dtype: torch.dtype | None) -> _Made:
    """A layer without its numbers."""
    adapter, before = layer.adapter, layer.adapter.rank
    if _is_small(layer, rule):
        rank = before
        if _stays(layer, dtype):
            return {}, LayerOutcome(layer.name, before, before)
    else:
        rank = rule.most(adapter.shape, min(before, *layer.sides))
    kept = without_numbers(layer.sides, rank, dtype or storage_dtype(adapter.up, adapter.down), scale=adapter.scale)
    return layer.tensors(kept), LayerOutcome(layer.name, before, rank)


def _is_small(layer: _Layer, rule: RankRule) -> bool:
    """Whether its rank is."""
    return not rule.depends_on_values and layer.adapter.rank <= rule.largest(layer.adapter.shape)


def _stays(layer: _Layer, dtype: torch.dtype | None) -> bool:
    """Whether the numbers of a layer whose rank is small enough are kept bit for bit."""
    return dtype is None and (layer.adapter.scale == 1 or not _SCALES.isdisjoint(layer.keys))


def _resized(layer: _Layer, rule: RankRule, dtype: torch.dtype | None) -> _Made:
    """A layer's new tensors by key, none if it is kept bit for bit; and what became of it."""
    adapter = layer.adapter
    low, before, lost = adapter.factors(), adapter.rank, 0.0
    if _is_small(layer, rule):
        norm = factors_norm(low)
        if _stays(layer, dtype):
            return {}, LayerOutcome(layer.name, before, before, norm)
        low = Factors(low.up.double(), low.down.double(), low.scale)
    else:
        cut = _cut(layer, rule)
        low = cut.factors._replace(scale=adapter.scale)
        norm, lost = (abs(adapter.scale) * part for part in (cut.norm, cut.lost))
    rank = low.up.shape[1]
    alpha = adapter.scale * rank if "alpha" in layer.keys else None
    kept = stored(balanced(low), dtype or storage_dtype(adapter.up, adapter.down), alpha)
    check_finite(layer.name, kept)
    error = math.hypot(lost, distance(balanced(low), kept.factors()))
    return layer.tensors(kept), LayerOutcome(layer.name, before, rank, norm, error)


def _cut(layer: _Layer, rule: RankRule) -> Truncation:
    """The best approximation of up @ down, without alpha."""
    shape, whole = layer.adapter.shape, layer.adapter.factors()
    try:
        return truncated(stacked([(whole._replace(scale=1.0), 1.0)]), lambda values: rule.of(values, shape))
    except AdapterError as error:
        raise AdapterError(f"layer {layer.name}: {error}") from error


def _comment(file: LoraFile, rule: RankRule, network: Network) -> str:
    """As kohya's resize_lora.py writes it."""
    former, before = file.metadata.get("ss_training_comment", ""), max(network.ranks)
    if rule.dynamic:
        return f"Dynamic resize with {rule.dynamic}: {rule.parameter} from {before}; {former}"
    conv = f" (conv: {rule.conv_rank})" if rule.conv_rank not in (None, rule.rank) else ""
    return f"dimension is resized from {before} to {rule.rank}{conv}; {former}"
