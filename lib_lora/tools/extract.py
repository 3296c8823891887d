"""What two checkpoints differ in, as a LoRA: the best approximation of every layer's ΔW = tuned - base of a rank."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.checkpoint import model_files
from lib_lora.core.files import map_checkpoint
from lib_lora.core.lora_names import kohya_name
from lib_lora.core.memory import OUT_OF_MEMORY
from lib_lora.core.saving import check_output, no_progress, save_tensors
from lib_lora.errors import AdapterError, JobError
from lib_lora.tools.device import usable_device
from lib_lora.tools.difference import open_pair
from lib_lora.tools.factored import balanced, check_finite, stored
from lib_lora.tools.metadata import lora_metadata
from lib_lora.tools.outcome import LayerOutcome, LoraOutcome, dtype_name
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.svd import clamped_like_kohya, truncated_dense

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.saving import Progress
    from lib_lora.tools.difference import LayerPair, ModelPair
    from lib_lora.tools.factored import StoredLayer

_linalg: Any = torch.linalg  # has no types
MIN_DIFF = 0.01
"""kohya's: a text encoder of which no number changed by more is taken as untouched."""
_PREDICTION = "modelspec.prediction_type"


def extract(
    base: Path,
    tuned: Path,
    out: Path,
    *,
    rank: int,
    conv_rank: int | None = None,
    clamp: float | None = None,
    min_diff: float = MIN_DIFF,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> LoraOutcome:
    """Write the LoRA that makes `tuned` of `base`, as nearly as its rank allows; alpha is the rank.

    Layers that are the same in both are left out.

    Args:
        base: A .safetensors checkpoint or a diffusers folder; SD1, SD2 or SDXL.
        tuned: The same, also in the other layout.
        out: The file to be, in kohya's layout.
        rank: Of Linear and 1x1 convolutions.
        conv_rank: Of larger kernels; None for a LoRA without residual, down- and upsampling blocks (LierLa).
        clamp: Quantile at which kohya's script cuts both factors off (0.99 there), which makes the error larger; None
            for the best approximation.
        min_diff: The text encoders are left out if none of their numbers differs by more.
        dtype: Of all tensors of the file; None for float32.
        device: Where to compute.
        overwrite: Whether an older file is replaced.
        progress: Told the layers done.

    Raises:
        FileError: If a file can not be read or written.
        ModelError: If a path is no model.
        BaseModelMismatchError, ShapeMismatchError: If the models do not belong together.
        NonFiniteError: If one holds NaN or infinity, or the result does not fit `dtype`.
        AdapterError: If a layer's singular values can not be computed.
        JobError: If the models are the same, one lacks layers, or an option makes no sense.
    """
    rule, dtype = RankRule(rank, conv_rank), dtype or torch.float32
    if clamp is not None and not 0 < clamp <= 1:
        raise JobError(f"the quantile to clamp at is {clamp}; choose one above 0 and up to 1, such as 0.99")
    if not min_diff >= 0:
        raise JobError(f"the smallest difference that counts is {min_diff}; choose 0 or more, such as {MIN_DIFF}")
    pair = open_pair(base, tuned, convolutions=conv_rank is not None)
    check_output(out, _size(pair, rule, dtype), overwrite=overwrite)
    place = usable_device(device)
    layers, notes = _changed_parts(pair, min_diff, place)
    tensors: dict[str, Tensor] = {}
    outcomes: list[LayerOutcome] = []
    for done, layer in enumerate(layers, 1):
        with _layer_told(layer.name):
            change = layer.difference(place)
            if change.any():
                kept = _approximation(layer, change, rule, clamp, dtype)
                tensors |= kept.tensors(kohya_name(layer.layer.key, pair.family), layer.layer.shape)
                outcomes.append(_outcome(layer.name, change, kept))
        progress(done, len(layers))
    if not outcomes:
        raise JobError(f"there is nothing to extract: {'; '.join((*notes, 'all other layers are the same in both'))}")
    metadata = lora_metadata(tensors, _said(tuned), family=pair.family, title=out.stem)
    save_tensors(out, tensors, metadata, overwrite=overwrite)
    same = len(layers) - len(outcomes)
    notes = (*notes, f"left out, for they are the same in both: {same} layers") if same else notes
    return LoraOutcome(out, out.stat().st_size, pair.family.value, dtype_name([dtype]), tuple(outcomes), notes)


def _size(pair: ModelPair, rule: RankRule, dtype: torch.dtype) -> int:
    """Bytes of the factors."""
    shapes = [layer.layer.shape for layer in pair.layers]
    return dtype.itemsize * sum(_rank(rule, shape) * (shape[0] + math.prod(shape[1:])) for shape in shapes)


def _rank(rule: RankRule, shape: Sequence[int]) -> int:
    return min(rule.largest(shape), shape[0], math.prod(shape[1:]))


def _changed_parts(pair: ModelPair, min_diff: float, device: torch.device) -> tuple[list[LayerPair], tuple[str, ...]]:
    """All layers, without those of the text encoders if these are as good as untouched; and what to tell."""
    text = [layer for layer in pair.layers if layer.layer.component != "unet"]
    most = 0.0
    for layer in text:
        most = max(most, layer.difference(device).abs().max().item())
        if most > min_diff:
            return list(pair.layers), pair.notes
    rest = [layer for layer in pair.layers if layer.layer.component == "unet"]
    note = f"text encoder left out: none of its numbers differs by more than {most:.3g} (--min-diff {min_diff:g})"
    return rest, (*pair.notes, note) if text else pair.notes


@contextmanager
def _layer_told(name: str) -> Generator[None]:
    """Faults that do not know their layer."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"layer {name}: {error}") from error
    except OUT_OF_MEMORY as error:
        raise JobError(f"layer {name}: not enough memory; with --device cpu that of the GPU is not needed") from error


def _approximation(
    layer: LayerPair, change: Tensor, rule: RankRule, clamp: float | None, dtype: torch.dtype
) -> StoredLayer:
    rank = _rank(rule, layer.layer.shape)
    low = balanced(truncated_dense(change, rank)) if clamp is None else clamped_like_kohya(change, rank, clamp)
    kept = stored(low, dtype)
    check_finite(layer.name, kept)
    return kept


def _outcome(name: str, change: Tensor, kept: StoredLayer) -> LayerOutcome:
    low = kept.factors()
    rest = torch.addmm(change, low.up.float(), low.down.float(), alpha=-low.scale)
    norm, error = (_linalg.vector_norm(part, dtype=torch.float64).item() for part in (change, rest))
    return LayerOutcome(name, min(change.shape), kept.rank, norm, error)


def _said(tuned: Path) -> dict[str, str]:
    """What the tuned model says that it predicts, if it does: names and shapes do not tell."""
    metadata = map_checkpoint(model_files(tuned)[0]).header.metadata
    return {_PREDICTION: metadata[_PREDICTION]} if _PREDICTION in metadata else {}
