"""Naming a file that is not what its name says, by its first bytes."""

from __future__ import annotations

import re

from lib_lora.errors import CorruptFileError, FileError, ForeignFileError, IncompleteFileError, PickleRefusedError

_SIGNATURES = (
    (b"version https://git-lfs", "a git-lfs pointer, the file itself was not downloaded"),
    (b"<", "a web page, not the file behind it"),
    (b"{", "a JSON text, probably an error message of the server"),
    (b"[", "a JSON text, probably an error message of the server"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"RIFF", "a WebP picture or other media file"),
    (b"%PDF-", "a PDF document"),
    (b"GGUF", "a GGUF model"),
    (b"\x93NUMPY", "a numpy array"),
)
_PICKLE = re.compile(rb"\x80[\x00-\x05]|c[\w.]+\n[\w.]+\n|\((dp|lp|c[\w.]+\n)")
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]+")


def foreign_file_error(head: bytes, file_size: int, name: str) -> FileError:
    """The refusal of a file that does not begin as .safetensors files do, naming what it is if that can be told.

    Args:
        head: Its first bytes, a few hundred.
        file_size: Its size in bytes.
        name: Its name, for the sentence.
    """
    if file_size < 8:
        size = f"{file_size} bytes" if file_size else "empty (0 bytes)"
        return IncompleteFileError(f"{name} is {size}, too short for a .safetensors file; download or save it again")
    if _PICKLE.match(head) or _is_torch_zip(head):
        return PickleRefusedError(
            f"{name} is a pickle, which can run programs when it is opened: "
            f"save it as .safetensors first, or run: python -m lib_lora convert-pickle {name}"
        )
    kind = _kind_of(head)
    if kind:
        return ForeignFileError(f"{name} is {kind}; a .safetensors file is needed")
    return CorruptFileError(f"{name} does not begin as a .safetensors file does; download or save it again")


def _is_torch_zip(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04") and b"data.pkl" in head


def _kind_of(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.decode("utf-16", "ignore").encode()
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    named = next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), None)
    return named or ("a text" if len(head) > 8 and _TEXT.fullmatch(head) else None)
