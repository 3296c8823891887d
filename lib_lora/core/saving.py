"""From tensors to a file: the only writing of files, with `lib_lora.core.replacing`; all or nothing."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from lib_lora.core.files import CHUNK_BYTES
from lib_lora.core.header import CHECKPOINT_LIMITS, DTYPES, MEGABYTE, Header, TensorInfo, encode_header
from lib_lora.core.opening import FileIdentity, checked_header, read_data, read_unchanged, reason_of, shown
from lib_lora.core.replacing import TempFile, check_target, replacing
from lib_lora.errors import FileChangedError, FileError, OutputError, UnsafePathError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from io import FileIO

    from torch import Tensor

    Progress: TypeAlias = "Callable[[int, int], None]"
    """Told how much of how much is done; what it raises ends the job, and nothing is left of it."""

VERIFIED_BYTES = 1 << 20
MAX_NAME_BYTES = 255

# Separators, wildcards, control characters, line separators, text direction overrides and lone surrogates.
_FORBIDDEN = re.compile('[\x00-\x1f\x7f-\x9f<>:"/\\\\|?*\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]')
_WINDOWS_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³])( *\..*)?", re.IGNORECASE)


FLOPS_PER_BYTE = 64
"""Operations in float32 that take about as long as reading, hashing or writing a byte."""


class LazyTensor(NamedTuple):
    """A tensor that is made when it is written, so that one at a time is in memory.

    Attributes:
        dtype: What `make` returns.
        shape: What `make` returns.
        make: Called once.
        work: What making it costs, in units of what writing a byte does; it counts in what `Progress` is told.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    work: int = 0


@dataclass(frozen=True)
class DiskSpace:
    """Room for a job's result, in bytes.

    Attributes:
        needed: At most.
        free: On the disk where it is to be, when that was looked for.
    """

    needed: int
    free: int


def no_progress(done: int, total: int) -> None:
    """Nobody wants to know."""


def output_path(folder: str | os.PathLike[str], name: str, suffix: str = ".safetensors") -> Path:
    """Path of a file directly inside `folder`, for a name that a user or an API call gave.

    Raises:
        UnsafePathError: If `name` is empty, has separators or control characters, is a device of Windows or longer
            than file systems allow, or if there is a link of that name.
    """
    plain = name.strip(". ") == name != "" and not _FORBIDDEN.search(name) and not _WINDOWS_DEVICE.fullmatch(name)
    if not plain or len(f"{name}{suffix}".encode()) > MAX_NAME_BYTES:
        raise UnsafePathError(f"{name[:80]!r} is not a plain file name; give one without folders and special signs")
    path = Path(folder) / f"{name}{suffix}"
    if path.is_symlink():
        raise UnsafePathError(f"{shown(path)} is a link that may lead out of the folder; choose another name")
    return path


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make and delete an empty file: to be called before hours of work, not after.

    Raises:
        OutputError: If `folder` is no folder or can not be written to.
    """
    try:
        TempFile(Path(folder)).discard()
    except (OSError, ValueError) as error:
        raise OutputError(f"the folder {shown(folder)} can not be written to: {reason_of(error)}") from error


def check_output(path: str | os.PathLike[str], size: int = 0, *, overwrite: bool = False) -> DiskSpace:
    """Whether a file can be written: to be called before hours of work, not after.

    Args:
        path: The file to be.
        size: Bytes that it will have, as far as that is known.
        overwrite: Whether an older file is replaced.

    Raises:
        OutputError: If `path` exists and `overwrite` is not set, is a link or no file; if its folder can not be written
            to, or its disk has not `size` bytes.
    """
    path = Path(path)
    check_target(path, overwrite)
    check_writable(path.parent)
    space = DiskSpace(size, shutil.disk_usage(path.parent).free)
    if space.free < size:
        raise OutputError(
            f"{shown(path)} needs {size / MEGABYTE:,.1f} MB and the disk has {space.free / MEGABYTE:,.1f} MB; make room"
        )
    return space


def file_size(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str] | None = None
) -> int:
    """Bytes of the file that `save_tensors` would make; tensors may be on the meta device.

    Raises:
        OutputError: If a tensor's type or a text can not be stored in `path`.
    """
    layout = _layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, Path(path))
    return len(_encoded(layout, metadata or {}, Path(path))) + _data_bytes(layout)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Write a .safetensors file: whole and verified, or not at all.

    Tensors may be on any device, share memory or have any strides; one at a time is copied. The layout is the
    library's: larger dtypes first, then by name.

    Args:
        path: The file to be.
        tensors: By name.
        metadata: Texts for the header.
        overwrite: Whether an older file is replaced.
        progress: Told the bytes written and the work of making them, after each tensor.

    Raises:
        OutputError: If `path` exists and `overwrite` is not set, is a link or no file, or can not be written; if a
            tensor or a metadata value can not be stored. An older file at `path` is then untouched.

    What a `LazyTensor` or `progress` raises passes through, and nothing is written.
    """
    path = Path(path)
    _save(path, layout_of(tensors, path), tensors, dict(metadata or {}), overwrite, progress)


def save_with_metadata(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Write a file that has the tensors of another, byte for byte at the same places, and other metadata.

    Args:
        source: The other file; may be the one that is replaced.
        path: The file to be.
        metadata: Texts for the header.
        overwrite: Whether an older file is replaced.
        progress: Told the bytes written, after each tensor.

    Raises:
        FileError: If `source` can not be read.
        FileChangedError: If it is written to meanwhile.
        OutputError: As `save_tensors`.
    """
    source = Path(source)
    identity, header = read_unchanged(source, lambda file: checked_header(file, CHECKPOINT_LIMITS, source))

    def stored(info: TensorInfo) -> LazyTensor:
        part = replace(header, data_start=header.data_start + info.begin, file_size=header.data_start + info.end)
        return LazyTensor(
            info.dtype, info.shape, lambda: _read_part(source, identity, part).view(info.dtype).view(info.shape)
        )

    tensors = {name: stored(info) for name, info in header.tensors.items()}
    _save(Path(path), header.tensors, tensors, dict(metadata), overwrite, progress)


def save_bytes(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> None:
    """Write a small file, such as a picture or JSON: whole or not at all.

    Raises:
        OutputError: As `save_tensors`.
    """
    with replacing(Path(path), len(data), overwrite) as temp:
        temp.write(data)


def copy_file(source: str | os.PathLike[str], path: str | os.PathLike[str], progress: Progress = no_progress) -> None:
    """Write a file that is like another, byte for byte: whole or not at all.

    Raises:
        OutputError: As `save_tensors`, or if `source` can not be read.
    """
    size = Path(source).stat().st_size
    with Path(source).open("rb") as file, replacing(Path(path), size, overwrite=False) as temp:
        while chunk := file.read(CHUNK_BYTES):
            temp.write(chunk)
            progress(file.tell(), size)


def remove_file(path: str | os.PathLike[str]) -> None:
    """Remove a file of our own making, or nothing if there is none.

    Raises:
        OutputError: If the system refuses that.
    """
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{shown(path)} can not be removed: {reason_of(error)}") from error


def _read_part(source: Path, identity: FileIdentity, part: Header) -> Tensor:
    """Bytes of a file, which is closed then: Windows replaces no file that is open or mapped."""
    now, data = read_unchanged(source, lambda file: read_data(file, part, source))
    if now != identity:
        raise FileChangedError(f"{shown(source)} is being written to; try again when that is done")
    return data


def _save(
    path: Path,
    layout: Mapping[str, TensorInfo],
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: dict[str, str],
    overwrite: bool,
    progress: Progress,
) -> None:
    header, size = _encoded(layout, metadata, path), _data_bytes(layout)
    works = {name: tensor.work for name, tensor in tensors.items() if isinstance(tensor, LazyTensor)}
    done, total = 0, size + sum(works.values())
    names = list(layout)
    probes = {names[0], names[len(names) // 2], names[-1]} if names else set[str]()
    with replacing(path, len(header) + size, overwrite) as temp:
        temp.write(header)
        beginnings: dict[str, bytes] = {}
        for name, info in layout.items():
            beginnings[name] = _write(temp, tensors[name], VERIFIED_BYTES if name in probes else 0)
            done += info.end - info.begin + works.get(name, 0)
            progress(done, total)
        temp.end()
        _verify(temp.file, layout, beginnings, metadata, path)


def _encoded(layout: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> bytes:
    try:
        return encode_header(layout, metadata)
    except ValueError as error:
        raise OutputError(f"{shown(path)} was not saved, a name has broken Unicode: {error}") from error


def _data_bytes(layout: Mapping[str, TensorInfo]) -> int:
    return sum(info.end - info.begin for info in layout.values())


def _write(temp: TempFile, tensor: Tensor | LazyTensor, kept: int) -> bytes:
    """Append a tensor; gives back its first bytes."""
    data = bytes_of(tensor.make() if isinstance(tensor, LazyTensor) else tensor)
    temp.write(data)
    return bytes(data[:kept])


def layout_of(tensors: Mapping[str, Tensor | LazyTensor], path: Path) -> dict[str, TensorInfo]:
    """Where each tensor goes: larger dtypes first, so that every one is aligned, then by name.

    Raises:
        OutputError: If a tensor can not be stored in `path`.
    """
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and (tensor.layout != torch.strided or tensor.is_meta):
            kind = f"{tensor.layout}, {tensor.device}"
            raise OutputError(f"{shown(path)} was not saved, tensor {name!r} can not be stored: {kind}")
        kinds[name] = tensor.dtype, tuple(tensor.shape)
    return _layout(kinds, path)


def _layout(kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], path: Path) -> dict[str, TensorInfo]:
    layout: dict[str, TensorInfo] = {}
    end = 0
    for name, (dtype, shape) in sorted(kinds.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        if dtype not in DTYPES.values():
            raise OutputError(f"{shown(path)} was not saved, tensor {name!r} can not be stored: {dtype}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        layout[name] = TensorInfo(dtype, shape, begin, end)
    return layout


def bytes_of(tensor: Tensor) -> memoryview:
    """The elements in row-major order; a copy only if they do not lie so in the CPU's memory."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # not reshape(-1): that keeps the odd stride that a tensor of one element may have
    flat = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
    return flat.numpy().data


def _verify(
    file: FileIO,
    layout: Mapping[str, TensorInfo],
    beginnings: Mapping[str, bytes],
    metadata: Mapping[str, str],
    path: Path,
) -> None:
    """Read back the header, and the beginning of some tensors."""
    try:
        header = checked_header(file, CHECKPOINT_LIMITS, path)
    except FileError as error:
        raise OutputError(f"{shown(path)} was not saved, what was written can not be read: {error}") from error
    if header.tensors != layout or header.metadata != metadata or header.unreadable:
        raise OutputError(f"{shown(path)} was not saved: metadata must be texts, and no tensor is named __metadata__")
    for name, expected in beginnings.items():
        file.seek(header.data_start + header.tensors[name].begin)
        if file.read(len(expected)) != expected:
            raise OutputError(f"{shown(path)} was not saved: the disk gave back other bytes for tensor {name!r}")
