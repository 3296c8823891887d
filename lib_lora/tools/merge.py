"""LoRAs into a checkpoint: no model is built, each tensor is read, changed and written when its turn comes."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.core.files import CHUNK_BYTES
from lib_lora.core.merged_file import MergedFile, MergeTypes
from lib_lora.core.opening import shown
from lib_lora.core.replacing import making_folder
from lib_lora.core.saving import check_output, copy_file, file_size, no_progress, save_tensors
from lib_lora.errors import JobError
from lib_lora.presets import PresetFiles
from lib_lora.resolve import Resolver, plan_of
from lib_lora.tools.device import usable_device
from lib_lora.tools.metadata import SHA256_LETTERS, UNKNOWN
from lib_lora.tools.outcome import Outcome
from lib_lora.tools.recipe import make_recipe, merged_metadata
from lib_lora.tools.source import open_model
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lib_lora.core.plan import FusePlan
    from lib_lora.core.saving import Progress
    from lib_lora.report import AppliedLora
    from lib_lora.resolve import ResolvedLora
    from lib_lora.tools.given import GivenLora
    from lib_lora.tools.source import ModelSource

Precision = Literal["float", "fp16", "bf16"]
PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType(
    {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
)


@dataclass(frozen=True, kw_only=True)
class MergeReport(Outcome):
    """A checkpoint with LoRAs merged into it.

    Attributes:
        model: What it is made of.
        base_model: The family.
        loras: What is merged.
        layers: How many layers of the model differ from the source's.
        precision: Of the calculation.
        save_precision: Of the weights, or None for the source's own.
        recipe: What the result's metadata says of its making.
        seconds: That it took.
    """

    model: str
    base_model: str
    loras: tuple[AppliedLora, ...]
    layers: int
    precision: str
    save_precision: str | None
    recipe: Mapping[str, Any]
    seconds: float

    def __str__(self) -> str:
        """For people."""
        verb = "written" if self.written else "would be written"
        lines = [f"+ {lora}" for lora in self.loras]
        lines += [f"! {note}" for note in self.notes]
        size = f"{self.size_text()}, {self.layers} layers of {self.base_model} changed"
        return "\n".join([*lines, f"{self.path}: {size}, {verb} in {self.seconds:.1f} s", *self.preview_lines()])


def merge_loras(
    model: Path,
    loras: Sequence[GivenLora],
    out: Path,
    *,
    precision: Precision = "float",
    save_precision: Precision | None = None,
    device: str = "cpu",
    presets: PresetFiles | None = None,
    hashed: bool = False,
    overwrite: bool = False,
    preview: bool = False,
    progress: Progress = no_progress,
) -> MergeReport:
    """Write a checkpoint whose weights are what the LoRAs would make of it in generation.

    Args:
        model: A .safetensors or .ckpt file, or a diffusers folder.
        loras: What is merged.
        out: The .safetensors file, or the folder, to be.
        precision: ``float``: one float32 sum, rounded once. Others: every step is rounded, as in kohya's script.
        save_precision: Of the weights; None for the source's own types.
        device: Where it is calculated.
        presets: Names of block weights; by default from files beside the LoRAs.
        hashed: Whether the recipe gets the SHA-256 of the model's file, which has to be read once more for that.
        overwrite: Whether an older file is replaced; a folder never is.
        preview: Whether names, shapes and places are checked, and nothing is calculated or written.
        progress: Told the work done, in about bytes.

    Raises:
        PrefuseError: If a file can not be read, a LoRA does not fit, a number overflows, or the result can not be
            written. Whatever was at `out` is untouched then.
    """
    start, work = time.perf_counter(), Work(progress)
    _check_places(out, model, loras)
    check_output(out, overwrite=overwrite)
    saved = PRECISIONS[save_precision] if save_precision else None
    types = MergeTypes(None if precision == "float" else PRECISIONS[precision], saved, usable_device(device))
    with open_model(model, out.parent) as source:
        laid = _laid(Resolver(LoraCatalog(()), source.keymap, presets or _presets_beside(loras)), loras, work)
        plan = plan_of(laid, "exact")
        files = [MergedFile(file, plan, types, is_part=source.is_folder) for file in source.weights]
        read = 2 * sum(lora.entry.identity.size for lora in loras)  # they are hashed too
        work.expect(read + sum(file.work for file in files))
        work.add(read)
        hashes = _hashes(model, source, work, preview=preview) if hashed else None
        recipe = make_recipe(model, hashes, laid, precision, save_precision)
        parts = list(_parts(source, files, recipe, out.stem))
        work.expect(sum(part.work for part in parts) - sum(file.work for file in files))
        size = sum(part.size for part in parts)
        disk = check_output(out, size, overwrite=overwrite)
        if not preview:
            _write(source, parts, out, work, overwrite=overwrite)
    return MergeReport(
        paths=(out,),
        size=size,
        disk=disk,
        metadata=parts[0].metadata,
        notes=_notes(laid, plan, source),
        written=not preview,
        model=str(model),
        base_model=source.keymap.base_model.value,
        loras=tuple(lora.applied() for lora in laid),
        layers=len(plan.patches),
        precision=precision,
        save_precision=save_precision,
        recipe=recipe,
        seconds=time.perf_counter() - start,
    )


def _laid(resolver: Resolver, loras: Sequence[GivenLora], work: Work) -> list[ResolvedLora]:
    """What each LoRA does to the model."""
    laid: list[ResolvedLora] = []
    for lora in loras:
        laid.append(resolver.lay(*lora))
        work.tick()
    return laid


def _check_places(out: Path, model: Path, loras: Sequence[GivenLora]) -> None:
    if model.is_file() and out.suffix != ".safetensors":
        raise JobError(f"{shown(out)}: a merged checkpoint is a .safetensors file; give it such a name")
    for source in (model, *(lora.entry.path for lora in loras)):
        if out.exists() and source.exists() and out.samefile(source):
            raise JobError(f"{shown(out)} is what is merged itself; choose another name")


def _presets_beside(loras: Sequence[GivenLora]) -> PresetFiles:
    return PresetFiles(dict.fromkeys(lora.entry.path.parent for lora in loras))


def _hashes(model: Path, source: ModelSource, work: Work, *, preview: bool) -> dict[str, str]:
    """File → SHA-256 of the whole file, as the WebUI names checkpoints; in a preview it is not read for that."""
    names = {file: file.relative_to(model).as_posix() for file in source.weights} if source.is_folder else {}
    names = names or {model: model.name}
    if preview:
        return dict.fromkeys(names.values(), UNKNOWN * SHA256_LETTERS)
    work.expect(sum(file.stat().st_size for file in names))
    return {name: _sha256(file, work) for file, name in names.items()}


def _sha256(path: Path, work: Work) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            work.add(len(chunk))
    return digest.hexdigest()


class _Part(NamedTuple):
    """A file of the result.

    Attributes:
        source: The file of the model that it is made of.
        file: How its tensors are made; None for a copy.
        metadata: Of the result.
        size: Bytes of the result.
        work: What writing it costs, in about bytes.
    """

    source: Path
    file: MergedFile | None
    metadata: Mapping[str, str]
    size: int
    work: int


def _parts(source: ModelSource, files: Sequence[MergedFile], recipe: Mapping[str, Any], title: str) -> Iterator[_Part]:
    for file in files:
        if file.is_changed or not source.is_folder:
            metadata = merged_metadata(file.metadata, recipe, source.keymap.base_model, title)
            yield _Part(file.path, file, metadata, file_size(file.path, file.tensors(), metadata), file.work)
        else:
            yield _copy(file.path, file.metadata)
    yield from map(_copy, source.others)


def _copy(path: Path, metadata: Mapping[str, str] = MappingProxyType({})) -> _Part:
    size = path.stat().st_size
    return _Part(path, None, metadata, size, size)


def _write(source: ModelSource, parts: Sequence[_Part], out: Path, work: Work, *, overwrite: bool) -> None:
    if not source.is_folder:
        _save(parts[0], out, work, overwrite=overwrite)
        return
    with making_folder(out) as temp:
        for part in parts:
            target = temp / part.source.relative_to(source.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            _save(part, target, work)


def _save(part: _Part, target: Path, work: Work, *, overwrite: bool = False) -> None:
    progress = work.stage(part.work)
    if part.file is None:
        copy_file(part.source, target, progress)
    else:
        save_tensors(target, part.file.tensors(), part.metadata, overwrite=overwrite, progress=progress)


def _notes(laid: Sequence[ResolvedLora], plan: FusePlan, source: ModelSource) -> tuple[str, ...]:
    notes = [note for lora in laid for note in lora.notes()]
    notes += [
        f"{lora.request.name}: its embeddings {', '.join(lora.network.embeddings)} are no part of a checkpoint"
        for lora in laid
        if lora.network.embeddings
    ]
    if not plan.patches:
        notes.append("no layer changes: every strength is 0")
    if source.left:
        names = ", ".join(map(shown, source.left))
        notes.append(f"left out, for they hold other weights than the merged ones: {names}")
    return tuple(dict.fromkeys(notes))
