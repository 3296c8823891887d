"""Tensors out of PyTorch's pickles without running what is in them.

The names a pickle may use are a short list, and each leads to a stand-in of ours that only records its arguments: no
function of torch, nor any other, is called by the pickle. The recorded tensors are checked against the file's bytes and
become views of them. Time and memory are not bounded here: `lib_lora.core.pickles` runs this in a process with limits.

Sources: torch/serialization.py (both container formats) and torch/_utils.py (the two rebuild functions).
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch

from lib_lora.core.header import MAX_DIMENSIONS
from lib_lora.core.opening import read_unchanged, shown
from lib_lora.errors import PickleRefusedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import FileIO

    from torch import Tensor

MAX_PICKLE_BYTES = 64_000_000
# Tensors may share memory and are written each for itself: what comes out is at most this many times the file.
MAX_GROWTH = 4

_STORAGES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ComplexFloatStorage": torch.complex64,
}
# What published checkpoints of 2022 hold beside their tensors; nothing of it is kept.
_IGNORED = {
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_LEGACY_START = pickle.dumps(_LEGACY_MAGIC, protocol=2)
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED_OR_ODD = ~0x0808  # all flags but "sizes follow the data" and "the name is UTF-8", which torch sets


class Span(NamedTuple):
    """First byte and last byte + 1 in the file."""

    begin: int
    end: int


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _TensorRecord(NamedTuple):
    """The arguments of `torch._utils._rebuild_tensor_v2`, not yet checked."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Dict(dict[Any, Any]):
    """Stands for OrderedDict; attributes that a pickle sets on it (`_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Take attributes and keep none."""


class _Ignored:
    """Stands for any object of `_IGNORED`: takes everything, keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: object) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Take attributes and keep none."""


class _Container(Protocol):
    """Where a pickle and the storages it names lie in a file."""

    def root(self) -> object: ...
    def span(self, storage: _Storage) -> Span: ...


class _Unpickler(pickle.Unpickler):
    """Knows the names that a table of tensors needs, and no other."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in _IGNORED:
            return _Ignored
        if module_name == "torch" and global_name in _STORAGES:
            return _STORAGES[global_name]
        stand_in = _STAND_INS.get((module_name, global_name))
        if stand_in is None:
            raise PickleRefusedError(f"it uses {module_name[:60]}.{global_name[:60]}, which is no part of a tensor")
        return stand_in

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or any(view):
            raise PickleRefusedError(f"it refers to {str(kind)[:40]!r}, which is no storage of a tensor")
        return self.storages.setdefault(key, _Storage(dtype, key, numel))


def _rebuild_tensor(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    requires_grad: object = None,
    hooks: object = None,
    metadata: object = None,
) -> _TensorRecord:
    if metadata:
        raise PickleRefusedError("it holds tensors that are conjugated or negated lazily")
    return _TensorRecord(storage, offset, size, stride)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


_STAND_INS: Mapping[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def read_pickle(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file made by `torch.save`, as views of a private map of the file.

    Of nested tables only the one named ``state_dict`` is read; whatever is not a tensor is left out.

    Raises:
        PickleRefusedError: If it uses a name that is no part of a tensor, has a tensor outside of its file, no tensor
            at all, or is a zip archive that torch would not write.
        FileError: If it can not be opened.
        Exception: Whatever the pickle module raises on damaged data.
    """
    path = Path(path)
    try:
        _, mapped = read_unchanged(path, _map)
        container = _LegacyFile(mapped) if mapped[: len(_LEGACY_START)] == _LEGACY_START else _ZipFile(mapped)
        records = _tensor_records(container.root())
        return _materialise(records, container, mapped)
    except PickleRefusedError as error:
        raise PickleRefusedError(f"{shown(path)} is refused: {error}") from error


def _map(file: FileIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _tensor_records(root: object) -> dict[str, _TensorRecord]:
    if isinstance(root, dict) and isinstance(nested := cast("dict[object, object]", root).get("state_dict"), dict):
        root = cast("dict[object, object]", nested)
    entries = cast("dict[object, object]", root).items() if isinstance(root, dict) else ()
    records = {key: item for key, item in entries if isinstance(key, str) and isinstance(item, _TensorRecord)}
    if not records:
        raise PickleRefusedError("it holds no table of tensors")
    return records


def _materialise(records: Mapping[str, _TensorRecord], container: _Container, mapped: mmap.mmap) -> dict[str, Tensor]:
    """Views of the file's bytes, after all records were found to lie within their storages."""
    for name, record in records.items():
        _check_record(name, record)
    size = sum(math.prod(record.size) * record.storage.dtype.itemsize for record in records.values())
    if size > MAX_GROWTH * len(mapped):
        raise PickleRefusedError(f"its tensors would take {size:,} bytes, the file has {len(mapped):,}")
    data = torch.frombuffer(mapped, dtype=torch.uint8)
    used: set[_Storage] = {record.storage for record in records.values()}
    storages = {storage: _elements(data, storage, container.span(storage)) for storage in used}
    return {name: _view(storages[record.storage], record) for name, record in records.items()}


def _view(elements: Tensor, record: _TensorRecord) -> Tensor:
    # as_strided counts from the beginning of the file, not of the view
    return elements.as_strided(record.size, record.stride, elements.storage_offset() + record.offset)


def _check_record(name: str, record: _TensorRecord) -> None:
    if not isinstance(record.storage, _Storage):
        raise PickleRefusedError(f"tensor {name[:80]!r} has no storage")
    size, stride = _numbers(name, record.size), _numbers(name, record.stride)
    offset, numel = _numbers(name, (record.offset, record.storage.numel))
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=False))
    if len(size) != len(stride) or (0 not in size and last >= numel):
        raise PickleRefusedError(f"tensor {name[:80]!r} of shape {size} lies outside of its storage")


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    numbers = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (None,)
    if len(numbers) > MAX_DIMENSIONS or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise PickleRefusedError(f"tensor {name[:80]!r} is not described by a few numbers")
    return cast("tuple[int, ...]", numbers)


def _elements(data: Tensor, storage: _Storage, span: Span) -> Tensor:
    """A storage's elements, flat: a view, or a copy where the file did not align them."""
    if span.end - span.begin != storage.numel * storage.dtype.itemsize:
        raise PickleRefusedError(f"storage {storage.key[:40]!r} has {span.end - span.begin} bytes, not {storage.numel}")
    raw = data[span.begin : span.end]
    if span.begin % storage.dtype.itemsize:
        raw = raw.clone()
    return raw.view(storage.dtype)


class _ZipFile:
    """The zip that torch writes: stored members, one of them data.pkl, the storages in data/ beside it."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        try:
            archive = zipfile.ZipFile(cast("Any", mapped))
        except zipfile.BadZipFile as error:
            raise PickleRefusedError(f"it is neither a zip nor an older file of torch ({error})") from error
        members = sorted(archive.infolist(), key=lambda info: info.header_offset)
        ends = [info.header_offset for info in members[1:]] + [archive.start_dir]
        self._members = {info.filename: (info, end) for info, end in zip(members, ends, strict=True)}
        pickles = [info.filename for info in members if info.filename.endswith("data.pkl")]
        if len(self._members) != len(members) or len(pickles) != 1:
            raise PickleRefusedError(f"the archive has members of one name or {len(pickles)} times data.pkl")
        self._prefix = pickles[0].removesuffix("data.pkl")
        self._check_names()

    def root(self) -> object:
        span = self._span(f"{self._prefix}data.pkl")
        if span.end - span.begin > MAX_PICKLE_BYTES:
            raise PickleRefusedError(f"its pickle has {span.end - span.begin:,} bytes")
        return _Unpickler(io.BytesIO(self._mapped[span.begin : span.end])).load()

    def span(self, storage: _Storage) -> Span:
        return self._span(f"{self._prefix}data/{storage.key}")

    def _check_names(self) -> None:
        for name in self._members:
            if not name.startswith(self._prefix) or ".." in name or "\\" in name or ":" in name or name[0] == "/":
                raise PickleRefusedError(f"the archive has a member named {name[:80]!r}")
        order = f"{self._prefix}byteorder"
        if order in self._members and self._mapped[slice(*self._span(order))] != b"little":
            raise PickleRefusedError("it was written on a big-endian computer")

    def _span(self, name: str) -> Span:
        """Where a member's bytes lie, which both of its headers must agree about."""
        if name not in self._members:
            raise PickleRefusedError(f"the archive has no member {name[:80]!r}")
        info, limit = self._members[name]
        start = info.header_offset
        fields = _LOCAL_HEADER.unpack(self._mapped[start : start + _LOCAL_HEADER.size])
        name_end = start + _LOCAL_HEADER.size + fields[9]
        begin = name_end + fields[10]
        span = Span(begin, begin + info.file_size)
        same = (
            fields[2] == info.flag_bits and self._mapped[name_end - fields[9] : name_end] == info.orig_filename.encode()
        )
        plain = not info.flag_bits & _ENCRYPTED_OR_ODD and fields[3] == info.compress_type == zipfile.ZIP_STORED
        if not same or not plain or info.compress_size != info.file_size or span.end > limit:
            raise PickleRefusedError(f"member {name[:80]!r} is packed, encrypted or contradicts itself")
        if zlib.crc32(memoryview(self._mapped)[span.begin : span.end]) != info.CRC:
            raise PickleRefusedError(f"member {name[:80]!r} is damaged, its checksum is wrong")
        return span


class _LegacyFile:
    """The format before torch 1.6: five pickles after each other, then the storages."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._spans: dict[str, Span] = {}

    def root(self) -> object:
        magic, version, system = (_Unpickler(self._mapped).load() for _ in range(3))
        little = isinstance(system, dict) and cast("dict[object, object]", system).get("little_endian") is True
        if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION or not little:
            raise PickleRefusedError("it is of another version of torch's old format or big-endian")
        unpickler = _Unpickler(self._mapped)
        root = unpickler.load()
        self._locate(_Unpickler(self._mapped).load(), unpickler.storages)
        return root

    def span(self, storage: _Storage) -> Span:
        if storage.key not in self._spans:
            raise PickleRefusedError(f"it lacks storage {storage.key[:40]!r}")
        return self._spans[storage.key]

    def _locate(self, keys: list[str], storages: Mapping[str, _Storage]) -> None:
        """Note where each storage lies: they follow each other, each after its number of elements."""
        begin = self._mapped.tell()
        for key in keys:
            if key not in storages:
                raise PickleRefusedError(f"it has a storage {str(key)[:40]!r} that no tensor uses")
            numel = int.from_bytes(self._mapped[begin : begin + 8], "little")
            self._spans[key] = span = Span(begin + 8, begin + 8 + numel * storages[key].dtype.itemsize)
            begin = span.end
        if begin > len(self._mapped):
            raise PickleRefusedError(f"it is incomplete: {len(self._mapped):,} of {begin:,} bytes")
