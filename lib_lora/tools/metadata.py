"""Metadata in the headers of files: what tools write there, and changing it without touching tensors.

Source: kohya's ``ss_*`` and ``sshs_*`` (sd-scripts, train_util.py and model_util.py), and the ModelSpec standard,
https://github.com/Stability-AI/ModelSpec.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lib_lora import __version__
from lib_lora.core.files import read_header
from lib_lora.core.header import CHECKPOINT_LIMITS, LORA_LIMITS, MEGABYTE, encode_header
from lib_lora.core.models import BaseModel
from lib_lora.core.opening import shown
from lib_lora.core.peft_settings import PEFT_SETTINGS
from lib_lora.core.saving import bytes_of, check_output, layout_of, no_progress, save_with_metadata
from lib_lora.errors import JobError
from lib_lora.tools.outcome import Outcome
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import Tensor

    from lib_lora.core.header import TensorInfo
    from lib_lora.core.saving import Progress

    Prediction = Literal["epsilon", "v"]

DYNAMIC = "Dynamic"
"""kohya's word for a rank or an alpha that differs from layer to layer."""

LEGACY_WINDOW = (0x100000, 0x110000)
"""Bytes of a file that its legacy hash looks at; a smaller file has the hash of nothing."""
LEGACY_LETTERS = 8
SHA256_LETTERS = 64

_NETWORK = "networks.lora"
_DOWN = ".lora_down.weight"
_STALE = ("modelspec.hash_sha256", PEFT_SETTINGS)
"""What is said of the tensors of the file that metadata is taken from, and not of others."""


UNKNOWN = "?"
"""Stands for each digit of a hash that a preview can not know."""


@dataclass(frozen=True, kw_only=True)
class MetadataEdit(Outcome):
    """What was changed in a header.

    Attributes:
        set: Keys that are new or have another text than before.
        removed: Keys that are gone.
    """

    set: tuple[str, ...]
    removed: tuple[str, ...]

    def __str__(self) -> str:
        """For people."""
        counts = f"{len(self.set)} set, {len(self.removed)} removed, {len(self.metadata)} in all"
        return "\n".join([f"{self.path}: {counts}", *self.preview_lines()])


@dataclass(frozen=True)
class _Kind:
    """How kohya and ModelSpec name models of one family.

    Attributes:
        base_model: ``ss_base_model_version``.
        architecture: ``modelspec.architecture`` of a checkpoint.
        resolution: That it was made for, in pixels.
        lora_implementation: Whose layer names its LoRAs have.
    """

    base_model: str
    architecture: str
    resolution: str
    lora_implementation: str


_SGM = "https://github.com/Stability-AI/generative-models"
_KINDS = {
    BaseModel.SD1: _Kind("sd_v1", "stable-diffusion-v1", "512x512", "diffusers"),
    BaseModel.SD2: _Kind("sd_v2_v", "stable-diffusion-v2-768-v", "768x768", "diffusers"),
    BaseModel.SDXL: _Kind("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024", _SGM),
}
_SD2_EPSILON = _Kind("sd_v2", "stable-diffusion-v2-512", "512x512", "diffusers")


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a LoRA or a checkpoint.

    Raises:
        FileError: If it can not be read.
    """
    return read_header(path, CHECKPOINT_LIMITS).metadata


def edit_metadata(
    source: Path,
    changes: Mapping[str, str],
    removed: Collection[str] = (),
    *,
    out: Path | None = None,
    overwrite: bool = False,
    preview: bool = False,
    progress: Progress = no_progress,
) -> MetadataEdit:
    """Change texts in a header; the tensors stay where and what they are, byte for byte.

    Args:
        source: The file.
        changes: Key → new text.
        removed: Keys that go.
        out: The file to be; None for `source` itself.
        overwrite: Whether an older file is replaced, `source` too.
        preview: Whether all is checked and nothing is written.
        progress: Told the bytes written.

    Raises:
        FileError: If `source` can not be read.
        JobError: If there is nothing to change, a key to be removed is not there, or the header becomes too long.
        OutputError: If the file can not be written.
    """
    header = read_header(source, CHECKPOINT_LIMITS)
    missing = [key for key in removed if key not in header.metadata]
    if missing or not (changes or removed):
        what = f"has no metadata {missing[0]!r} to remove" if missing else "stays as it is: nothing to set or to remove"
        raise JobError(f"{shown(source)} {what}")
    metadata = {key: text for key, text in header.metadata.items() if key not in removed} | dict(changes)
    size = _length(header.tensors, metadata, source) + header.file_size - header.data_start
    path = out or source
    disk = check_output(path, size, overwrite=overwrite)
    work = Work(progress)
    work.expect(size)
    if not preview:
        save_with_metadata(source, path, metadata, overwrite=overwrite, progress=work.stage(size))
    return MetadataEdit(
        paths=(path,),
        size=size,
        disk=disk,
        metadata=metadata,
        written=not preview,
        set=tuple(key for key, text in changes.items() if header.metadata.get(key) != text),
        removed=tuple(removed),
    )


def model_spec(
    family: BaseModel,
    *,
    title: str,
    is_lora: bool,
    prediction: Prediction | None = None,
    merged_from: Sequence[str] = (),
    now: datetime | None = None,
) -> dict[str, str]:
    """The ``modelspec.*`` texts of a new file.

    Args:
        family: What it is, or is for. Of others than SD1, SD2 and SDXL only title, date and origin are told.
        title: For people; the file's name without suffix.
        is_lora: Whether it is a LoRA, not a checkpoint.
        prediction: What the UNet predicts; None for the family's usual, which is ``v`` for SD2.
        merged_from: Titles of the files that it was made of.
        now: Local time to be written; None for the clock's.
    """
    prediction = prediction or usual_prediction(family)
    spec = {"sai_model_spec": "1.0.1", "title": title, "implementation_version": f"prefuse/{__version__}"}
    spec["date"] = (now or datetime.now()).isoformat(timespec="seconds")
    if kind := _kind(family, prediction):
        spec["architecture"] = f"{kind.architecture}/lora" if is_lora else kind.architecture
        spec["implementation"] = kind.lora_implementation if is_lora else _SGM
        spec |= {"resolution": kind.resolution, "prediction_type": prediction}
    if merged_from:
        spec["merged_from"] = ", ".join(merged_from)
    return {f"modelspec.{key}": value for key, value in spec.items()}


def usual_prediction(family: BaseModel, metadata: Mapping[str, str] | None = None) -> Prediction:
    """What a UNet of `family` predicts, as far as `metadata` of a file of it does not say otherwise."""
    metadata = metadata or {}
    said = metadata.get("modelspec.prediction_type", "").partition("_")[0]
    if said in ("epsilon", "v"):
        return said
    if family is BaseModel.SD2:
        return "epsilon" if metadata.get("ss_base_model_version") == "sd_v2" else "v"
    return "epsilon"


def base_model_facts(family: BaseModel, prediction: Prediction) -> dict[str, str]:
    """``ss_base_model_version`` and ``ss_v2`` of a family; nothing of others than SD1, SD2 and SDXL."""
    kind = _kind(family, prediction)
    return {"ss_base_model_version": kind.base_model, "ss_v2": str(family is BaseModel.SD2)} if kind else {}


def lora_metadata(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, str],
    *,
    family: BaseModel,
    title: str,
    merged_from: Sequence[str] = (),
    now: datetime | None = None,
    progress: Progress = no_progress,
) -> dict[str, str]:
    """The metadata of a LoRA file in kohya's layout that a tool makes.

    Args:
        tensors: What will be saved, in the dtypes in which it will be: the hashes are of these. See `sshs_hashes`.
        base: Metadata that is kept where nothing here says otherwise, such as the source's.
        family: What it is for.
        title: For people; the file's name without suffix.
        merged_from: Titles of the files that it was made of.
        now: Local time to be written; None for the clock's.
        progress: Told the bytes that are hashed.

    Raises:
        OutputError: If a tensor can not be saved.
    """
    prediction = usual_prediction(family, base)
    metadata = {key: value for key, value in base.items() if not key.startswith("sshs_") and key not in _STALE}
    if known := base_model_facts(family, prediction):
        metadata = {**known, **metadata, "ss_v2": known["ss_v2"]}
    metadata |= network_facts(tensors, base.get("ss_network_args", ""))
    metadata |= model_spec(family, title=title, is_lora=True, prediction=prediction, merged_from=merged_from, now=now)
    return metadata | sshs_hashes(tensors, metadata, progress)


def network_facts(tensors: Mapping[str, Tensor], arguments: str = "") -> dict[str, str]:
    """``ss_network_module``, ``_dim``, ``_alpha`` and ``_args`` of LoRA tensors in kohya's layout.

    Args:
        tensors: By kohya's keys. Without one ``lora_down`` nothing is told.
        arguments: The former ``ss_network_args``; what it says of convolutions is replaced.
    """
    ranks = {name.removesuffix(_DOWN): down.shape[0] for name, down in tensors.items() if name.endswith(_DOWN)}
    if not ranks:
        return {}
    conv = {name for name in ranks if tensors[name + _DOWN].shape[2:].numel() > 1}
    alphas = {name: _alpha(tensors, name, rank) for name, rank in ranks.items()}
    main = ranks.keys() - conv or conv
    others = {key: value for key, value in _arguments(arguments).items() if key not in ("conv_dim", "conv_alpha")}
    if conv:
        others["conv_dim"] = one_or_dynamic(ranks[name] for name in conv)
        others["conv_alpha"] = one_or_dynamic(alphas[name] for name in conv)
    facts = {
        "ss_network_module": _NETWORK,
        "ss_network_dim": one_or_dynamic(ranks[name] for name in main),
        "ss_network_alpha": one_or_dynamic(alphas[name] for name in main),
    }
    return facts | ({"ss_network_args": json.dumps(others)} if others or arguments else {})


def one_or_dynamic(values: Iterable[float]) -> str:
    """The only value that occurs, or ``Dynamic`` if there are several."""
    different = set(values)
    return str(different.pop()) if len(different) == 1 else DYNAMIC


def sshs_hashes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], progress: Progress = no_progress
) -> dict[str, str]:
    """``sshs_model_hash`` and ``sshs_legacy_hash`` of what is going to be saved.

    The first is SHA-256 of the tensors' bytes in the file, which editing the metadata does not change. The second is
    of `LEGACY_WINDOW` of a file that has no metadata but `metadata`'s ``ss_*``.

    Args:
        tensors: In the dtypes in which they will be saved. If one is on the meta device, the hashes are `UNKNOWN`.
        metadata: The file's metadata.
        progress: Told the bytes that are hashed.

    Raises:
        OutputError: If a tensor can not be saved.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        return {"sshs_model_hash": UNKNOWN * SHA256_LETTERS, "sshs_legacy_hash": UNKNOWN * LEGACY_LETTERS}
    layout = layout_of(tensors, Path(metadata.get("modelspec.title", "the file")))
    header = encode_header(layout, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    first, last = LEGACY_WINDOW
    whole, window = hashlib.sha256(), hashlib.sha256(header[first:last])
    begin = len(header)
    size = sum(info.end - info.begin for info in layout.values())
    for name, info in layout.items():
        data = bytes_of(tensors[name])
        whole.update(data)
        window.update(data[max(0, first - begin) : max(0, last - begin)])
        begin += len(data)
        progress(info.end, size)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:LEGACY_LETTERS]}


def _length(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], source: Path) -> int:
    """Bytes of a header that every program can read: as long as a LoRA's may be here, without nameless texts."""
    if "" in metadata:
        raise JobError(f"{shown(source)}: metadata needs a name, such as modelspec.title")
    try:
        length = len(encode_header(tensors, metadata))
    except ValueError as error:
        raise JobError(f"{shown(source)}: a text of the metadata has broken Unicode: {error}") from error
    if length > LORA_LIMITS.header_bytes:
        most = LORA_LIMITS.header_bytes // MEGABYTE
        raise JobError(f"{shown(source)} would have a header of {length / MEGABYTE:,.1f} MB, at most {most} are read")
    return length


def _kind(family: BaseModel, prediction: Prediction) -> _Kind | None:
    return _SD2_EPSILON if (family, prediction) == (BaseModel.SD2, "epsilon") else _KINDS.get(family)


def _alpha(tensors: Mapping[str, Tensor], name: str, rank: int) -> float:
    alpha = tensors.get(f"{name}.alpha")
    return float(rank if alpha is None else alpha.item())


def _arguments(text: str) -> dict[str, Any]:
    """A JSON object; an empty one where it is none."""
    try:
        arguments: Any = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", arguments) if isinstance(arguments, dict) else {}
