"""From a path to tensors and back: checked reading, and with `lib_lora.core.replacing` the only writing of files.

Reading trusts neither the name nor the content of a file; writing is all or nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lib_lora.core.header import (
    CHECKPOINT_LIMITS,
    DTYPES,
    LORA_LIMITS,
    Header,
    HeaderLimits,
    TensorInfo,
    encode_header,
)
from lib_lora.core.opening import (
    FileIdentity,
    checked_header,
    map_data,
    read_data,
    read_unchanged,
    reason_of,
    shown,
    tensor_view,
)
from lib_lora.core.replacing import TempFile, replacing
from lib_lora.errors import FileError, OutputError, UnsafePathError

if TYPE_CHECKING:
    import os
    from io import FileIO

    from torch import Tensor

# Files up to this many bytes are read into memory; larger ones are mapped.
READ_LIMIT = 2 * 1024**3
CHUNK_BYTES = 1 << 20
MAX_NAME_BYTES = 255

# Separators, wildcards, control characters, line separators, text direction overrides and lone surrogates.
_FORBIDDEN = re.compile('[\x00-\x1f\x7f-\x9f<>:"/\\\\|?*\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]')
_WINDOWS_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³])( *\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class LoraFile:
    """What a file holds, not interpreted.

    Attributes:
        path: Where it was read.
        identity: Which content was read.
        metadata: The header's texts.
        tensors: Tensors by name, on the CPU, as in the file: views of one buffer, not to be written to.
    """

    path: Path
    identity: FileIdentity
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]


class MappedTensors(Mapping[str, "Tensor"]):
    """The tensors of a mapped file: each access makes a view, and only what is read takes memory.

    The mapping is private: writing to a tensor does not reach the file. Cutting the file short while it is mapped ends
    the process (SIGBUS), as with every memory map.

    Attributes:
        header: The file's header.
        identity: Which content is mapped.
    """

    def __init__(self, header: Header, identity: FileIdentity, data: Tensor) -> None:
        self.header = header
        self.identity = identity
        self._data = data

    def __getitem__(self, name: str) -> Tensor:
        return tensor_view(self._data, self.header.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)


def read_lora_file(path: str | os.PathLike[str]) -> LoraFile:
    """All tensors and metadata of a LoRA file, read whole (mapped from 2 GiB on).

    Raises:
        IncompleteFileError: If the file is shorter or longer than its header says.
        ForeignFileError: If it is not a .safetensors file, whatever its name says.
        PickleRefusedError: If it is a pickle.
        CorruptFileError: If its header lies or is beyond `LORA_LIMITS`.
        FileChangedError: If it is written to all the time.
        FileError: If it is missing, not a regular file, can not be read, or does not fit in memory.
    """
    path = Path(path)

    def read(file: FileIO) -> tuple[Header, Tensor]:
        header = checked_header(file, LORA_LIMITS, path)
        return header, (read_data if header.file_size <= READ_LIMIT else map_data)(file, header, path)

    identity, (header, data) = read_unchanged(path, read)
    tensors: Mapping[str, Tensor] = MappedTensors(header, identity, data)
    if header.file_size <= READ_LIMIT:
        tensors = dict(tensors)
    return LoraFile(path, identity, header.metadata, tensors)


def read_header(path: str | os.PathLike[str], limits: HeaderLimits = LORA_LIMITS) -> Header:
    """Metadata and the place of every tensor, without the tensors.

    Raises:
        FileError: As `read_lora_file`.
    """
    path = Path(path)
    return read_unchanged(path, lambda file: checked_header(file, limits, path))[1]


def map_checkpoint(path: str | os.PathLike[str]) -> MappedTensors:
    """The tensors of a checkpoint, mapped: no memory is taken but the system's file cache.

    Raises:
        FileError: As `read_lora_file`, with `CHECKPOINT_LIMITS`.
    """
    path = Path(path)

    def read(file: FileIO) -> tuple[Header, Tensor]:
        header = checked_header(file, CHECKPOINT_LIMITS, path)
        return header, map_data(file, header, path)

    identity, (header, data) = read_unchanged(path, read)
    return MappedTensors(header, identity, data)


def data_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 in hex of the bytes after the header: the same for a file whose metadata was edited.

    Source: the hash of kohya's additional networks extension, which the WebUI writes into pictures.

    Raises:
        FileError: As `read_lora_file`, with `CHECKPOINT_LIMITS`.
    """
    path = Path(path)

    def read(file: FileIO) -> str:
        file.seek(checked_header(file, CHECKPOINT_LIMITS, path).data_start)
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()

    return read_unchanged(path, read)[1]


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


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a .safetensors file: whole and verified, or not at all.

    Tensors may be on any device, share memory or have any strides; one at a time is copied. The layout is the
    library's: larger dtypes first, then by name.

    Raises:
        OutputError: If `path` exists and `overwrite` is not set, is a link or no file, or can not be written; if a
            tensor or a metadata value can not be stored. An older file at `path` is then untouched.
    """
    path, metadata = Path(path), dict(metadata or {})
    layout = _layout(tensors, path)
    try:
        header = encode_header(layout, metadata)
    except ValueError as error:
        raise OutputError(f"{shown(path)} was not saved, a name has broken Unicode: {error}") from error
    size = len(header) + sum(info.end - info.begin for info in layout.values())
    with replacing(path, size, overwrite) as temp:
        temp.write(header)
        for name in layout:
            temp.write(_bytes_of(tensors[name]))
        _verify(temp.file, tensors, metadata, path)


def save_bytes(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> None:
    """Write a small file, such as a picture or JSON: whole or not at all.

    Raises:
        OutputError: As `save_tensors`.
    """
    with replacing(Path(path), len(data), overwrite) as temp:
        temp.write(data)


def _layout(tensors: Mapping[str, Tensor], path: Path) -> dict[str, TensorInfo]:
    """Where each tensor goes: larger dtypes first, so that every one is aligned, then by name."""
    layout: dict[str, TensorInfo] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        tensor = tensors[name]
        if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise OutputError(f"{shown(path)} was not saved, tensor {name!r} can not be stored: {kind}")
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        layout[name] = TensorInfo(tensor.dtype, tuple(tensor.shape), begin, end)
    return layout


def _bytes_of(tensor: Tensor) -> memoryview:
    """The elements in row-major order; a copy only if they do not lie so in the CPU's memory."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # not reshape(-1): that keeps the odd stride that a tensor of one element may have
    flat = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
    return flat.numpy().data


def _verify(file: FileIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Read back the header, and the beginning of the first, the middle and the last tensor."""
    try:
        header = checked_header(file, CHECKPOINT_LIMITS, path)
    except FileError as error:
        raise OutputError(f"{shown(path)} was not saved, what was written can not be read: {error}") from error
    if header.tensors.keys() != tensors.keys() or header.metadata != metadata or header.unreadable:
        raise OutputError(f"{shown(path)} was not saved: metadata must be texts, and no tensor is named __metadata__")
    names = list(header.tensors)
    for name in {names[0], names[len(names) // 2], names[-1]} if names else ():
        expected = _bytes_of(tensors[name])[:CHUNK_BYTES]
        file.seek(header.data_start + header.tensors[name].begin)
        if file.read(len(expected)) != expected:
            raise OutputError(f"{shown(path)} was not saved: the disk gave back other bytes for tensor {name!r}")
