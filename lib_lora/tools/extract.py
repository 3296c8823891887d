"""What two checkpoints differ in, as a LoRA: the best approximation of every layer's ΔW = tuned - base of a rank."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from lib_lora.core.checkpoint import model_files
from lib_lora.core.files import map_checkpoint
from lib_lora.core.lora_names import kohya_name
from lib_lora.core.memory import OUT_OF_MEMORY
from lib_lora.core.saving import FLOPS_PER_BYTE, check_output, no_progress, save_tensors
from lib_lora.errors import AdapterError, JobError
from lib_lora.tools.device import usable_device
from lib_lora.tools.difference import open_pair
from lib_lora.tools.factored import balanced, check_finite, stored, without_numbers
from lib_lora.tools.metadata import lora_metadata
from lib_lora.tools.outcome import LayerOutcome, LoraOutcome, LoraResult, dtype_name
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.svd import clamped_like_kohya, decomposition_flops, truncated_dense
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.saving import Progress
    from lib_lora.tools.difference import LayerPair, ModelPair
    from lib_lora.tools.factored import StoredLayer

    _Made: TypeAlias = "tuple[Mapping[str, Tensor], LayerOutcome]"

_linalg: Any = torch.linalg  # has no types
MIN_DIFF = 0.01
"""kohya's: a text encoder of which no number changed by more is taken as untouched."""
AT_MOST_NOTE = "at most: layers that are the same in both models are left out"
_READ = 8
"""Units of `Work` for each number of a layer: it is read twice, subtracted, and looked at."""
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
    preview: bool = False,
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
        preview: Whether all is checked as far as headers tell, and nothing is calculated or written.
        progress: Told the work done, in about bytes.

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
    work = Work(progress)
    pair = open_pair(base, tuned, convolutions=conv_rank is not None)
    job = _Job(pair, out, rule, clamp, dtype, usable_device(device), _said(tuned))
    planned = job.planned()
    disk = check_output(out, planned.size, overwrite=overwrite)
    if preview:
        return planned.outcome(disk, written=False)
    work.expect(sum(map(job.cost, pair.layers)) + 2 * planned.size)
    layers, notes = _changed_parts(job, min_diff, work)
    made = [new for layer in layers if (new := job.extracted(layer, work))]
    if not made:
        raise JobError(f"there is nothing to extract: {'; '.join((*notes, 'all other layers are the same in both'))}")
    same = len(layers) - len(made)
    notes = (*notes, f"left out, for they are the same in both: {same} layers") if same else notes
    result = job.result(made, notes, work.stage(planned.size))
    save_tensors(out, result.tensors, result.metadata, overwrite=overwrite, progress=work.stage(planned.size))
    return result.outcome(disk, written=True)


class _Job(NamedTuple):
    """What `extract` was asked for."""

    pair: ModelPair
    out: Path
    rule: RankRule
    clamp: float | None
    dtype: torch.dtype
    device: torch.device
    said: Mapping[str, str]

    def rank(self, layer: LayerPair) -> int:
        """Of its factors."""
        return min(self.rule.largest(layer.layer.shape), *layer.sides)

    def planned(self) -> LoraResult:
        """All layers, without their numbers."""
        made: list[_Made] = []
        for layer in self.pair.layers:
            rank = self.rank(layer)
            tensors = self._tensors(layer, without_numbers(layer.sides, rank, self.dtype))
            made.append((tensors, LayerOutcome(layer.name, min(layer.sides), rank)))
        return self.result(made, self.pair.notes)

    def cost(self, layer: LayerPair) -> int:
        """Units of `Work`: two weights are read, their difference is decomposed, and so is the rest of it looked at."""
        rows, columns = layer.sides
        rest = 2 * rows * columns * self.rank(layer)
        return _READ * rows * columns + (decomposition_flops(rows, columns, self.rank(layer)) + rest) // FLOPS_PER_BYTE

    def extracted(self, layer: LayerPair, work: Work) -> _Made | None:
        """A layer's tensors by kohya's keys, and what became of it; None if it is the same in both models."""
        with _layer_told(layer.name):
            change = layer.difference(self.device)
            work.tick()
            made = None
            if change.any():
                kept = self._approximation(layer, change, work.tick)
                made = self._tensors(layer, kept), _outcome(layer.name, change, kept)
        work.add(self.cost(layer))
        return made

    def result(self, made: Sequence[_Made], notes: tuple[str, ...], progress: Progress = no_progress) -> LoraResult:
        """The whole file; `progress` is told the bytes that are hashed."""
        tensors = {name: tensor for new, _ in made for name, tensor in new.items()}
        family, layers = self.pair.family, tuple(outcome for _, outcome in made)
        metadata = lora_metadata(tensors, self.said, family=family, title=self.out.stem, progress=progress)
        dtype = dtype_name([self.dtype])
        return LoraResult(self.out, tensors, metadata, family.value, dtype, layers, notes, AT_MOST_NOTE)

    def _tensors(self, layer: LayerPair, kept: StoredLayer) -> Mapping[str, Tensor]:
        return kept.tensors(kohya_name(layer.layer.key, self.pair.family), layer.layer.shape)

    def _approximation(self, layer: LayerPair, change: Tensor, tick: Callable[[], None]) -> StoredLayer:
        rank = self.rank(layer)
        if self.clamp is None:
            low = balanced(truncated_dense(change, rank, tick))
        else:
            low = clamped_like_kohya(change, rank, self.clamp)
        kept = stored(low, self.dtype)
        check_finite(layer.name, kept)
        return kept


def _changed_parts(job: _Job, min_diff: float, work: Work) -> tuple[list[LayerPair], tuple[str, ...]]:
    """All layers, without those of the text encoders if these are as good as untouched; and what to tell."""
    pair = job.pair
    text = [layer for layer in pair.layers if layer.layer.component != "unet"]
    most = 0.0
    for layer in text:
        most = max(most, layer.difference(job.device).abs().max().item())
        work.tick()
        if most > min_diff:
            return list(pair.layers), pair.notes
    work.expect(-sum(map(job.cost, text)))
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


def _outcome(name: str, change: Tensor, kept: StoredLayer) -> LayerOutcome:
    low = kept.factors()
    rest = torch.addmm(change, low.up.float(), low.down.float(), alpha=-low.scale)
    norm, error = (_linalg.vector_norm(part, dtype=torch.float64).item() for part in (change, rest))
    return LayerOutcome(name, min(change.shape), kept.rank, norm, error)


def _said(tuned: Path) -> dict[str, str]:
    """What the tuned model says that it predicts, if it does: names and shapes do not tell."""
    metadata = map_checkpoint(model_files(tuned)[0]).header.metadata
    return {_PREDICTION: metadata[_PREDICTION]} if _PREDICTION in metadata else {}
