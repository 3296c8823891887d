"""LoRAs into a checkpoint: no model is built, each tensor is read, changed and written when its turn comes."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.core.files import CHUNK_BYTES
from lib_lora.core.merged_file import MergedFile, MergeTypes
from lib_lora.core.opening import shown
from lib_lora.core.replacing import making_folder
from lib_lora.core.saving import check_output, copy_file, no_progress, save_tensors
from lib_lora.errors import JobError
from lib_lora.presets import PresetFiles
from lib_lora.resolve import Resolver, plan_of
from lib_lora.tools.device import usable_device
from lib_lora.tools.recipe import make_recipe, merged_metadata
from lib_lora.tools.source import open_model

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
HEADER_BYTES = 1 << 20
"""More than the metadata adds."""


@dataclass(frozen=True)
class MergeReport:
    """A checkpoint with LoRAs merged into it.

    Attributes:
        model: What it is made of.
        out: Where it is, or would be.
        base_model: The family.
        loras: What is merged.
        layers: How many layers of the model differ from the source's.
        size: Bytes.
        precision: Of the calculation.
        save_precision: Of the weights, or None for the source's own.
        recipe: What the result's metadata says of its making.
        notes: Sentences for the user.
        seconds: That it took.
        written: Whether it was written, or is a preview.
    """

    model: Path
    out: Path
    base_model: str
    loras: tuple[AppliedLora, ...]
    layers: int
    size: int
    precision: str
    save_precision: str | None
    recipe: Mapping[str, Any]
    notes: tuple[str, ...]
    seconds: float
    written: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """For people."""
        verb = "written" if self.written else "would be written"
        lines = [f"+ {lora}" for lora in self.loras]
        lines += [f"! {note}" for note in self.notes]
        size = f"{self.size / 1e6:,.1f} MB, {self.layers} layers of {self.base_model} changed"
        return "\n".join([*lines, f"{self.out}: {size}, {verb} in {self.seconds:.1f} s"])


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
        progress: Told the bytes written.

    Raises:
        PrefuseError: If a file can not be read, a LoRA does not fit, a number overflows, or the result can not be
            written. Whatever was at `out` is untouched then.
    """
    start = time.perf_counter()
    _check_places(out, model, loras)
    check_output(out, overwrite=overwrite)
    saved = PRECISIONS[save_precision] if save_precision else None
    types = MergeTypes(None if precision == "float" else PRECISIONS[precision], saved, usable_device(device))
    with open_model(model, out.parent) as source:
        resolver = Resolver(LoraCatalog(()), source.keymap, presets or _presets_beside(loras))
        laid = [resolver.lay(*lora) for lora in loras]
        plan = plan_of(laid, "exact")
        files = [MergedFile(file, plan, types, is_part=source.is_folder) for file in source.weights]
        size = sum(file.size for file in files) + sum(file.stat().st_size for file in source.others)
        check_output(out, size + HEADER_BYTES, overwrite=overwrite)
        recipe = make_recipe(model, _hashes(model, source) if hashed else None, laid, precision, save_precision)
        if not preview:
            _write(_Result(source, out, files, recipe, size), overwrite, progress)
    return MergeReport(
        model=model,
        out=out,
        base_model=source.keymap.base_model.value,
        loras=tuple(lora.applied() for lora in laid),
        layers=len(plan.patches),
        size=size,
        precision=precision,
        save_precision=save_precision,
        recipe=recipe,
        notes=_notes(laid, plan, source),
        seconds=time.perf_counter() - start,
        written=not preview,
    )


class _Result(NamedTuple):
    """What is to be written: `files` of the model, and its others as they are; `size` is of all."""

    source: ModelSource
    out: Path
    files: Sequence[MergedFile]
    recipe: Mapping[str, Any]
    size: int


def _check_places(out: Path, model: Path, loras: Sequence[GivenLora]) -> None:
    if model.is_file() and out.suffix != ".safetensors":
        raise JobError(f"{shown(out)}: a merged checkpoint is a .safetensors file; give it such a name")
    for source in (model, *(lora.entry.path for lora in loras)):
        if out.exists() and source.exists() and out.samefile(source):
            raise JobError(f"{shown(out)} is what is merged itself; choose another name")


def _presets_beside(loras: Sequence[GivenLora]) -> PresetFiles:
    return PresetFiles(dict.fromkeys(lora.entry.path.parent for lora in loras))


def _hashes(model: Path, source: ModelSource) -> dict[str, str]:
    """File → SHA-256 of the whole file, as the WebUI names checkpoints."""
    if not source.is_folder:
        return {model.name: _sha256(model)}
    return {file.relative_to(model).as_posix(): _sha256(file) for file in source.weights}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _write(result: _Result, overwrite: bool, progress: Progress) -> None:
    if not result.source.is_folder:
        _save(result, result.files[0], result.out, overwrite, progress)
        return
    done = 0
    with making_folder(result.out) as temp:
        for path, file in _contents(result):
            target = temp / path.relative_to(result.source.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            advance = partial(_advance, progress, done, result.size)
            if file is None:
                copy_file(path, target, advance)
            else:
                _save(result, file, target, False, advance)
            done += path.stat().st_size if file is None else file.size


def _contents(result: _Result) -> Iterator[tuple[Path, MergedFile | None]]:
    """Every file of the folder to be, and how it is made if it is not a copy."""
    yield from ((file.path, file if file.is_changed else None) for file in result.files)
    yield from ((path, None) for path in result.source.others)


def _advance(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _save(result: _Result, file: MergedFile, target: Path, overwrite: bool, progress: Progress) -> None:
    family = result.source.keymap.base_model
    metadata = merged_metadata(file.metadata, result.recipe, family, result.out.stem)
    save_tensors(target, file.tensors(), metadata, overwrite=overwrite, progress=progress)


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
