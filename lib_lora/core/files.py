"""From a path to tensors: reading that trusts neither the name nor the content of a file."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lib_lora.core.header import (
    CHECKPOINT_LIMITS,
    LORA_LIMITS,
    Header,
    HeaderLimits,
)
from lib_lora.core.opening import (
    FileIdentity,
    checked_header,
    map_file,
    read_data,
    read_unchanged,
    tensor_view,
)

if TYPE_CHECKING:
    import os
    from io import FileIO

    from torch import Tensor

    from lib_lora.core.saving import Progress

# Files up to this many bytes are read into memory; larger ones are mapped.
READ_LIMIT = 2 * 1024**3
CHUNK_BYTES = 1 << 20


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
    the process (SIGBUS), as with every memory map. What was read counts as memory of this process, though the system
    can take it back at any time; `release` gives it back.

    Attributes:
        header: The file's header.
        identity: Which content is mapped.
    """

    def __init__(self, header: Header, identity: FileIdentity, mapped: mmap.mmap) -> None:
        self.header = header
        self.identity = identity
        self._mapped = mapped
        self._data = torch.frombuffer(mapped, dtype=torch.uint8)[header.data_start :]

    def __getitem__(self, name: str) -> Tensor:
        return tensor_view(self._data, self.header.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)

    def release(self, name: str) -> None:
        """Give back the memory of one tensor; where it is used again, it is read again. What was written is lost."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows keeps what it keeps
            return
        info = self.header.tensors[name]
        begin, end = self.header.data_start + info.begin, self.header.data_start + info.end
        begin -= begin % mmap.PAGESIZE
        if end > begin:
            self._mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)


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

    def read(file: FileIO) -> tuple[Header, Tensor | mmap.mmap]:
        header = checked_header(file, LORA_LIMITS, path)
        return header, (read_data if header.file_size <= READ_LIMIT else map_file)(file, header, path)

    identity, (header, content) = read_unchanged(path, read)
    if isinstance(content, mmap.mmap):
        return LoraFile(path, identity, header.metadata, MappedTensors(header, identity, content))
    tensors = {name: tensor_view(content, info) for name, info in header.tensors.items()}
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

    def read(file: FileIO) -> tuple[Header, mmap.mmap]:
        header = checked_header(file, CHECKPOINT_LIMITS, path)
        return header, map_file(file, header, path)

    identity, (header, mapped) = read_unchanged(path, read)
    return MappedTensors(header, identity, mapped)


def data_sha256(path: str | os.PathLike[str], progress: Progress | None = None) -> str:
    """SHA-256 in hex of the bytes after the header: the same for a file whose metadata was edited.

    Source: the hash of kohya's additional networks extension, which the WebUI writes into pictures.

    Args:
        path: The file.
        progress: Told the bytes read.

    Raises:
        FileError: As `read_lora_file`, with `CHECKPOINT_LIMITS`.
    """
    path = Path(path)

    def read(file: FileIO) -> str:
        header = checked_header(file, CHECKPOINT_LIMITS, path)
        file.seek(header.data_start)
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(file.tell(), header.file_size)
        return digest.hexdigest()

    return read_unchanged(path, read)[1]
