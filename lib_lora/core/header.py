"""The header of a safetensors file, read without trusting it.

The format: 8 bytes length N (little endian), N bytes of JSON, then the tensors' bytes without a gap.
Source: https://github.com/huggingface/safetensors#format. The checks are our own, so that neither the refusals nor
their sentences change with the installed version of a library.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from lib_lora.core.foreign import foreign_file_error
from lib_lora.errors import CorruptFileError, IncompleteFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LENGTH_BYTES = 8
HEAD_BYTES = 512
MAX_DIMENSIONS = 32
MAX_DIGITS = 20
# Each value of a JSON text but the first of a list follows a comma: a bound of the memory that it becomes.
MAX_COMMAS = 2_000_000
MEGABYTE = 1_000_000

_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _DTYPE_NAMES.items() if hasattr(torch, attribute)
}

_DAMAGED = "; download or save it again"


class TensorInfo(NamedTuple):
    """Where a tensor lies in a file.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        begin: Its first byte, counted from the header's end.
        end: Its last byte + 1.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors cover the file's data without gap or overlap.

    Attributes:
        metadata: Texts by name. Whatever was not a text is left out or, a plain number, written as JSON.
        tensors: Place of each tensor, in the order of the data.
        data_start: Offset of the first tensor's first byte in the file.
        file_size: Size of the file in bytes.
        unreadable: Names of metadata that were not texts.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int
    file_size: int
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeaderLimits:
    """What is refused before it costs time or memory.

    Attributes:
        header_bytes: Longest header in bytes.
        tensors: Most tensors.
    """

    header_bytes: int
    tensors: int


# Trainers put thumbnails into the metadata, hence megabytes; an SDXL LoCon has about 2,600 tensors.
LORA_LIMITS = HeaderLimits(32 * MEGABYTE, 20_000)
# The format's own limit.
CHECKPOINT_LIMITS = HeaderLimits(100 * MEGABYTE, 100_000)


def header_length(head: bytes, file_size: int, limits: HeaderLimits, name: str) -> int:
    """Length of the JSON in bytes, from a file's first bytes (`HEAD_BYTES`, or fewer if the file is shorter).

    Args:
        head: The first bytes.
        file_size: Size of the file in bytes.
        limits: What to refuse.
        name: The file's name, for the sentence of a refusal.

    Raises:
        PickleRefusedError: If the file is a pickle or PyTorch's archive of one.
        ForeignFileError: If the file is something else that can be named.
        IncompleteFileError: If the file ends within its header.
        CorruptFileError: If the length can not be right.
    """
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    opens = head[LENGTH_BYTES : LENGTH_BYTES + 1]
    if file_size < LENGTH_BYTES or length > CHECKPOINT_LIMITS.header_bytes or opens not in (b"{", b""):
        raise foreign_file_error(head, file_size, name)
    if length > limits.header_bytes:
        raise CorruptFileError(f"{name} has a header of {_mb(length)} MB, at most {_mb(limits.header_bytes)} are read")
    if LENGTH_BYTES + length > file_size:
        raise IncompleteFileError(f"{name} is incomplete: it ends after {file_size} bytes, within its header{_DAMAGED}")
    return length


def parse_header(raw: bytes, file_size: int, limits: HeaderLimits, name: str) -> Header:
    """The checked header from its JSON.

    Args:
        raw: The JSON's bytes.
        file_size: Size of the whole file in bytes.
        limits: What to refuse.
        name: The file's name, for the sentence of a refusal.

    Raises:
        CorruptFileError: If it is not JSON, repeats a name, names an unknown dtype, has offsets that overlap, leave
            a hole or do not fit the shape, or has more tensors than `limits` allows.
        IncompleteFileError: If the file is shorter or longer than the tensors.
    """
    try:
        entries = _parse_json(raw, limits.tensors)
        metadata, unreadable = _read_metadata(entries.pop("__metadata__", {}))
        tensors = _in_data_order({key: _tensor_info(key, entry) for key, entry in entries.items()})
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{name} has a damaged header: {_printable(str(error))}{_DAMAGED}") from error
    header = Header(metadata, tensors, LENGTH_BYTES + len(raw), file_size, unreadable)
    _check_size(header, name)
    return header


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces so that the data begins at a multiple of 8 bytes.

    Raises:
        ValueError: If a name can not be written as UTF-8.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, info in tensors.items():
        entries[key] = {"dtype": names[info.dtype], "shape": info.shape, "data_offsets": (info.begin, info.end)}
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % LENGTH_BYTES)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


class _Repeated(dict[str, Any]):
    """A JSON object in which `name` stands twice."""

    name: str = ""


def _parse_json(raw: bytes, most_tensors: int) -> dict[str, Any]:
    if raw.count(b",") > MAX_COMMAS:
        raise ValueError(f"it has more than {MAX_COMMAS:,} values")
    if raw.count(b'"data_offsets"') > most_tensors:  # the usual spelling, told before any of it is parsed
        raise ValueError(f"it has more than {most_tensors:,} tensors")
    decoded = json.loads(raw.decode(), object_pairs_hook=_object_reader(most_tensors), parse_int=_bounded_int)
    if not isinstance(decoded, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 -- one kind of fault for all of its shapes
    entries = cast("dict[str, Any]", decoded)
    _refuse_repeated(entries, "the file")
    return entries


def _object_reader(most_tensors: int) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """A hook that keeps repeated names visible and stops the parser at one object too many."""
    objects = 0

    def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > most_tensors + 2:  # the metadata and the header itself are objects too
            raise ValueError(f"it has more than {most_tensors:,} tensors")
        result = dict(pairs)
        return result if len(result) == len(pairs) else _repeated(pairs)

    return read_object


def _repeated(pairs: list[tuple[str, Any]]) -> _Repeated:
    seen: set[str] = set()
    result = _Repeated(pairs)
    result.name = next(key for key, _ in pairs if key in seen or seen.add(key))
    return result


def _refuse_repeated(entry: dict[str, Any], where: str) -> None:
    if isinstance(entry, _Repeated):
        raise ValueError(f"{where} has two entries named {entry.name!r}")  # noqa: TRY004 -- as in _parse_json


def _bounded_int(text: str) -> int | str:
    """An integer; a text where it is so long that converting it would take minutes on Python 3.10.6."""
    return int(text) if len(text) <= MAX_DIGITS else text


def _read_metadata(value: object) -> tuple[dict[str, str], tuple[str, ...]]:
    """Texts by name, and the names of what was none. Never raises: metadata does not decide what a file is."""
    if not isinstance(value, dict):
        return {}, ("__metadata__",)
    entries = cast("dict[str, object]", value)
    metadata = {_encodable(key): text for key, item in entries.items() if (text := _metadata_text(item)) is not None}
    unreadable = tuple(_encodable(key) for key, item in entries.items() if not isinstance(item, str))
    return metadata, (*unreadable, value.name) if isinstance(value, _Repeated) else unreadable


def _metadata_text(value: object) -> str | None:
    if isinstance(value, str):
        return _encodable(value)
    return json.dumps(value) if value is None or isinstance(value, (bool, int, float)) else None


def _encodable(text: str) -> str:
    """The text with lone surrogates replaced: they can neither be printed nor saved."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _tensor_info(name: str, value: object) -> TensorInfo:
    name.encode()  # a lone surrogate ends here, not where the name is printed
    if not isinstance(value, dict):
        raise ValueError(f"tensor {name!r} has no description")  # noqa: TRY004 -- as in _parse_json
    entry = cast("dict[str, Any]", value)
    _refuse_repeated(entry, f"tensor {name!r}")
    dtype = _dtype(name, entry.get("dtype"))
    shape = _sizes(name, "shape", entry.get("shape"))
    offsets = _sizes(name, "data_offsets", entry.get("data_offsets"))
    size = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"tensor {name!r} of shape {shape} and {dtype} has the offsets {offsets}")
    if not size and math.prod(length or 1 for length in shape) >= 2**63:  # torch can not stride over it
        raise ValueError(f"tensor {name!r} has the impossible shape {shape}")
    return TensorInfo(dtype, shape, *offsets)


def _dtype(name: str, value: object) -> torch.dtype:
    dtype = DTYPES.get(value) if isinstance(value, str) else None
    if dtype is None:
        reason = f"torch {torch.__version__} does not have" if value in [*_DTYPE_NAMES] else "nobody knows"
        raise ValueError(f"tensor {name!r} has the dtype {str(value)[:40]!r} that {reason}")
    return dtype


def _sizes(name: str, what: str, value: object) -> tuple[int, ...]:
    sizes: tuple[Any, ...] = tuple(cast("list[Any]", value)) if isinstance(value, list) else (None,)
    if len(sizes) > MAX_DIMENSIONS or not {int}.issuperset(map(type, sizes)) or min(sizes, default=0) < 0:
        raise ValueError(f"tensor {name!r} has the {what} {str(sizes[:MAX_DIMENSIONS])[:80]}")
    return sizes


def _in_data_order(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors sorted by place, which must follow each other without hole or overlap."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    expected = 0
    for name, info in ordered.items():
        if info.begin != expected:
            fault = "overlaps another" if info.begin < expected else "comes after a hole"
            raise ValueError(f"tensor {name!r} at byte {info.begin} {fault}, {expected} was expected")
        expected = info.end
    return ordered


def _check_size(header: Header, name: str) -> None:
    expected = header.data_start + max((info.end for info in header.tensors.values()), default=0)
    if expected > header.file_size:
        found, whole = _mb(header.file_size), _mb(expected)
        size = f"{found} of {whole} MB ({header.file_size} of {expected} bytes)"
        raise IncompleteFileError(f"{name} is incomplete: {size}{_DAMAGED}")
    if expected < header.file_size:
        surplus = header.file_size - expected
        raise IncompleteFileError(f"{name} is {surplus} bytes longer than its header says{_DAMAGED}")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)[:500]


def _mb(size: int) -> str:
    return f"{size / MEGABYTE:,.1f}"
