"""LoRAs into a checkpoint: no model is built, each tensor is read, changed and written when its turn comes."""

from __future__ import annotations

import hashlib
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from lib_lora.catalog import LoraCatalog
from lib_lora.core.checkpoint import COMPONENTS, model_files, model_keymap
from lib_lora.core.files import CHUNK_BYTES, read_header
from lib_lora.core.header import CHECKPOINT_LIMITS
from lib_lora.core.merged_file import MergedFile, MergeTypes
from lib_lora.core.opening import shown
from lib_lora.core.pickles import convert_pickle
from lib_lora.core.replacing import making_folder, scratch_file
from lib_lora.core.saving import check_output, copy_file, no_progress, save_tensors
from lib_lora.errors import JobError, ModelError, PickleRefusedError
from lib_lora.resolve import Resolver, plan_of
from lib_lora.tools.recipe import make_recipe, merged_metadata

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from lib_lora.core.keymap import KeyMap
    from lib_lora.core.models import BaseModel
    from lib_lora.core.plan import FusePlan
    from lib_lora.core.saving import Progress
    from lib_lora.report import AppliedLora
    from lib_lora.resolve import ResolvedLora
    from lib_lora.tools.given import GivenLora

Precision = Literal["float", "fp16", "bf16"]
PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType(
    {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
)
CONVERT_SECONDS = 1800.0
"""For a pickle of several GB on a busy disk."""
HEADER_BYTES = 1 << 20
"""More than the metadata adds."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")
"""Weights that a merged folder would have unchanged."""


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
        hashed: Whether the recipe gets the SHA-256 of the model's file, which has to be read once more for that.
        overwrite: Whether an older file is replaced; a folder never is.
        preview: Whether all is checked and nothing written.
        progress: Told the bytes written.

    Raises:
        PrefuseError: If a file can not be read, a LoRA does not fit, a number overflows, or the result can not be
            written. Whatever was at `out` is untouched then.
    """
    start = time.perf_counter()
    _check_places(model, out)
    check_output(out, overwrite=overwrite)
    saved = PRECISIONS[save_precision] if save_precision else None
    types = MergeTypes(None if precision == "float" else PRECISIONS[precision], saved, _usable(device))
    with _as_safetensors(model, out.parent) as source:
        keymap = _keymap(source, model)
        resolver = Resolver(LoraCatalog(()), keymap)
        laid = [resolver.lay(*lora) for lora in loras]
        plan = plan_of(laid, "exact")
        files = [MergedFile(file, plan, types, is_part=source.is_dir()) for file in _weight_files(source)]
        size = sum(file.size for file in files)
        check_output(out, size + HEADER_BYTES, overwrite=overwrite)
        recipe = make_recipe(model, _hashes(model) if hashed else None, laid, precision, save_precision)
        if not preview:
            _write(_Result(source, out, files, recipe, keymap.base_model), overwrite, progress)
    return MergeReport(
        model=model,
        out=out,
        base_model=keymap.base_model.value,
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
    """What is to be written: `files` of the model at `source`, to `out`."""

    source: Path
    out: Path
    files: Sequence[MergedFile]
    recipe: Mapping[str, Any]
    family: BaseModel


def _check_places(model: Path, out: Path) -> None:
    if model.is_file() and out.suffix != ".safetensors":
        raise JobError(f"{shown(out)}: a merged checkpoint is a .safetensors file; give it such a name")
    if out.exists() and model.exists() and out.samefile(model):
        raise JobError(f"{shown(out)} is the model itself; choose another name")


def _usable(device: str) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA was compiled in
        raise JobError(f"the device {device} can not be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


@contextmanager
def _as_safetensors(model: Path, folder: Path) -> Generator[Path]:
    """The model itself; of a pickle, a .safetensors file in `folder` that lasts as long as the block."""
    if not model.is_file() or not _is_pickle(model):
        yield model
        return
    with scratch_file(folder) as converted:
        convert_pickle(model, converted, timeout_s=CONVERT_SECONDS)
        yield converted


def _is_pickle(file: Path) -> bool:
    try:
        read_header(file, CHECKPOINT_LIMITS)
    except PickleRefusedError:
        return True
    return False


def _keymap(source: Path, model: Path) -> KeyMap:
    for folder in filter(Path.is_dir, source.iterdir() if source.is_dir() else ()):
        has_pickles = any(file.suffix in PICKLES for file in folder.iterdir())
        if folder.name in COMPONENTS and has_pickles and not any(folder.glob("*.safetensors")):
            raise ModelError(f"{shown(model)}/{folder.name} has no .safetensors weights; save it in that format first")
    keymap = model_keymap(source)
    if not len(keymap):
        raise ModelError(
            f"{shown(model)} is no checkpoint: none of its tensors is a layer of a UNet or a text encoder by its name"
        )
    return keymap


def _weight_files(source: Path) -> list[Path]:
    """The files whose numbers are calculated or cast."""
    return [*model_files(source), *(sorted(source.glob("vae/*.safetensors")) if source.is_dir() else ())]


def _hashes(model: Path) -> dict[str, str]:
    """File name → SHA-256 of the whole file, as the WebUI names checkpoints."""
    files = [model] if model.is_file() else _weight_files(model)
    return {file.relative_to(model.parent).as_posix(): _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _write(result: _Result, overwrite: bool, progress: Progress) -> None:
    if not result.source.is_dir():
        _save(result, result.files[0], result.out, overwrite, progress)
        return
    changed = {file.path: file for file in result.files if file.is_changed}
    others = [path for path in _folder_files(result.source) if path not in changed]
    copied = [path for path in others if not _is_left_out(path, result.source)]
    total = sum(file.size for file in changed.values()) + sum(path.stat().st_size for path in copied)
    done = 0
    with making_folder(result.out) as temp:
        for path in (*changed, *copied):
            target = temp / path.relative_to(result.source)
            target.parent.mkdir(parents=True, exist_ok=True)
            advance = partial(_advance, progress, done, total)
            if path in changed:
                _save(result, changed[path], target, False, advance)
            else:
                copy_file(path, target, advance)
            done += changed[path].size if path in changed else path.stat().st_size


def _advance(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _save(result: _Result, file: MergedFile, target: Path, overwrite: bool, progress: Progress) -> None:
    metadata = merged_metadata(file.metadata, result.recipe, result.family, result.out.stem)
    save_tensors(target, file.tensors(), metadata, overwrite=overwrite, progress=progress)


def _folder_files(model: Path) -> list[Path]:
    return sorted(file for file in (*model.glob("*"), *model.glob("*/**/*")) if file.is_file())


def _is_left_out(file: Path, model: Path) -> bool:
    """Whether it is a weight file of a diffusers folder that is not used there, and would not be merged."""
    if file.parent == model:
        return file.suffix in (*PICKLES, ".safetensors")
    return file.parent.name in COMPONENTS and file.suffix in PICKLES


def _notes(laid: Sequence[ResolvedLora], plan: FusePlan, source: Path) -> tuple[str, ...]:
    notes = [note for lora in laid for note in lora.notes()]
    notes += [
        f"{lora.request.name}: its embeddings {', '.join(lora.network.embeddings)} are no part of a checkpoint"
        for lora in laid
        if lora.network.embeddings
    ]
    if not plan.patches:
        notes.append("no layer changes: every strength is 0")
    left = [file for file in _folder_files(source) if _is_left_out(file, source)]
    if left:
        notes.append(f"left out, for they hold other weights than the merged ones: {', '.join(map(shown, left))}")
    return tuple(dict.fromkeys(notes))
