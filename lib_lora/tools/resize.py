"""Another rank for a LoRA: the best approximation of each layer's up @ down, in the keys and the layout of its file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_lora.core.adapters import Factors
from lib_lora.core.adapters.lora import LoraAdapter
from lib_lora.core.files import read_lora_file
from lib_lora.core.naming import BIAS, PIPELINE_PARTS, split_key
from lib_lora.core.network import network_from_file
from lib_lora.core.norms import factors_norm
from lib_lora.core.peft_settings import PEFT_SETTINGS, Rank, peft_settings
from lib_lora.core.saving import check_output, no_progress, save_tensors
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
)
from lib_lora.tools.metadata import lora_metadata
from lib_lora.tools.outcome import LayerOutcome, LoraOutcome, dtype_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from lib_lora.core.files import LoraFile
    from lib_lora.core.network import Network
    from lib_lora.core.saving import Progress
    from lib_lora.tools.ranks import RankRule

_PEFT_UP = ".lora_B.weight"
_FOLDED = ("lora_mid", "scale")
"""Tucker's core is folded into `down`, a scale of its own into alpha or `up`."""
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


def resize(
    lora: Path,
    out: Path,
    rule: RankRule,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
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
        progress: Told the layers done.

    Raises:
        FileError: If a file can not be read or written.
        NamingError, AdapterError: If the file is no good LoRA.
        NonFiniteError: If it holds NaN, or its new numbers do not fit `dtype`.
        JobError: If it has no layers with factors, or PEFT's settings scale others that it has.
    """
    check_output(out, overwrite=overwrite)
    file = read_lora_file(lora)
    network = network_from_file(file)
    layers = _layers(file, network)
    check_output(out, sum(_size(layer, rule, dtype) for layer in layers), overwrite=overwrite)
    notes = _notes(file, network, layers)
    tensors = {key: _as(tensor, dtype) for key, tensor in file.tensors.items()}
    outcomes: list[LayerOutcome] = []
    for done, layer in enumerate(layers, 1):
        new, outcome = _resized(layer, rule, dtype)
        for role in _FOLDED if new else ():
            tensors.pop(layer.keys.get(role, ""), None)
        if new and layer.bias and "alpha" not in layer.keys:
            tensors[layer.bias] = tensors[layer.bias] * layer.adapter.scale
        tensors |= new
        outcomes.append(outcome)
        progress(done, len(layers))
    said = dict(file.metadata) | {"ss_training_comment": _comment(file, rule, network)}
    metadata = lora_metadata(tensors, said, family=network.base_model, title=out.stem) | _settings(layers, outcomes)
    save_tensors(out, tensors, metadata, overwrite=overwrite)
    dtypes = dtype_name(tensors[layer.keys["lora_up"]].dtype for layer in layers)
    return LoraOutcome(out, out.stat().st_size, network.base_model.value, dtypes, tuple(outcomes), notes)


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


def _size(layer: _Layer, rule: RankRule, dtype: torch.dtype | None) -> int:
    """Bytes of a layer's factors, with a dynamic method at most."""
    up, shape = layer.adapter.up, layer.adapter.shape
    rank = min(rule.largest(shape), layer.adapter.rank)
    return rank * (shape[0] + math.prod(shape[1:])) * (dtype or up.dtype).itemsize


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


def _resized(layer: _Layer, rule: RankRule, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], LayerOutcome]:
    """A layer's new tensors by key, none if it is kept bit for bit; and what became of it."""
    adapter, keys = layer.adapter, layer.keys
    low, before, norm, lost = adapter.factors(), adapter.rank, 0.0, 0.0
    if rule.dynamic is None and not rule.kohya and before <= rule.largest(adapter.shape):
        norm = factors_norm(low)
        if dtype is None and (adapter.scale == 1 or not _SCALES.isdisjoint(keys)):
            return {}, LayerOutcome(layer.name, before, before, norm, 0.0)
        low = Factors(low.up.double(), low.down.double(), low.scale)
    else:
        cut = _cut(layer, rule)
        low = cut.factors._replace(scale=adapter.scale)
        norm, lost = (abs(adapter.scale) * part for part in (cut.norm, cut.lost))
    rank = low.up.shape[1]
    alpha = adapter.scale * rank if "alpha" in keys else None
    kept = stored(balanced(low), dtype or storage_dtype(adapter.up, adapter.down), alpha)
    check_finite(layer.name, kept)
    ones = (1,) * (len(adapter.shape) - 2)
    new = {keys["lora_up"]: kept.up.view(-1, rank, *ones), keys["lora_down"]: kept.down.view(rank, *adapter.shape[1:])}
    new |= {keys["alpha"]: kept.alpha} if "alpha" in keys else {}
    error = math.hypot(lost, distance(balanced(low), kept.factors()))
    return new, LayerOutcome(layer.name, before, rank, norm, error)


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
