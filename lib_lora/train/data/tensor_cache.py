"""Tensors that were costly to make, by a text that says what they were made of: in memory, or in files."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING

from lib_lora.core.files import read_lora_file
from lib_lora.core.fingerprint import samples
from lib_lora.core.saving import bytes_of, save_tensors
from lib_lora.errors import FileError
from lib_lora.train.data.folders import make_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor


class TensorCache:
    """Tensors by name, for each key.

    A file is used only if it is whole and made for its very key, so the folder may be shared, damaged or deleted.
    """

    def __init__(self, folder: Path | None) -> None:
        """In files below `folder`, or in memory if it is None."""
        self._folder = folder
        self._held: dict[str, Mapping[str, Tensor]] = {}

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """What was put; None if there is nothing, or it is damaged."""
        if self._folder is None:
            return self._held.get(key)
        try:
            file = read_lora_file(self._path(self._folder, key))
        except FileError:
            return None
        whole = file.metadata.get("key") == key and file.metadata.get("crc32") == checksum(file.tensors)
        return file.tensors if whole else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, on the CPU.

        Raises:
            OutputError: If they can not be written.
        """
        kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        if self._folder is None:
            self._held[key] = kept
            return
        path = self._path(self._folder, key)
        make_folder(path.parent)
        save_tensors(path, kept, {"key": key, "crc32": checksum(kept)}, overwrite=True)

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return folder / digest[:2] / f"{digest}.safetensors"


def weights_fingerprint(weights: Iterable[Tensor]) -> str:
    """What tells an encoder from others: dtypes, shapes and some elements of its weights, as a short text."""
    weights = list(weights)
    digest = hashlib.blake2b(digest_size=16)
    for weight, sample in zip(weights, samples(weights), strict=True):
        digest.update(f"{sample.dtype} {tuple(weight.shape)}".encode())
        digest.update(sample.content)
    return digest.hexdigest()


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """CRC-32 in hex of a text, and of the names and bytes of tensors."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(bytes_of(tensors[name]), zlib.crc32(name.encode(), value))
    return f"{value:08x}"
