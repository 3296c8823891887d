"""Bad .safetensors files, and what refusing one must be: quick, and one sentence."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from lib_lora.core.files import read_lora_file
from lib_lora.errors import FileError

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_REFUSAL_S = 1.0
MEAN_REFUSAL_S = 0.05
HEADER_DOS_S = 0.1
SETTLING_S = 0.03
"""After this long the time of a file's last write is trusted at once, so that tests measure the refusal alone."""
ALLOWED_KB = 200_000
LONGEST_SENTENCE = 700


def raw_file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def write_all(folder: Path, contents: list[bytes]) -> list[Path]:
    paths = [folder / f"{index}.safetensors" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    time.sleep(SETTLING_S)
    return paths


def refusal(path: Path, read=read_lora_file) -> tuple[FileError, float]:
    """The fault, and the processor time it took: a busy machine does not count."""
    start = time.thread_time()
    with pytest.raises(FileError) as caught:
        read(path)
    return caught.value, time.thread_time() - start


def assert_refused(folder: Path, contents: list[bytes]) -> list[FileError]:
    refusals = [refusal(path) for path in write_all(folder, contents)]
    assert max(seconds for _, seconds in refusals) < LONGEST_REFUSAL_S
    return [error for error, _ in refusals]
