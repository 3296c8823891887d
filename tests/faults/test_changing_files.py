"""Files that change while they are read: whole, or refused."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

from lib_lora.core.files import read_lora_file
from lib_lora.core.opening import read_unchanged
from lib_lora.errors import FileChangedError, IncompleteFileError
from tests.bad_files import SETTLING_S, entry, raw_file

if TYPE_CHECKING:
    from pathlib import Path


def content(value: int) -> bytes:
    tensors = {f"t{index}": entry(index * 4000, index * 4000 + 4000) for index in range(50)}
    return raw_file(tensors, torch.full((50_000,), float(value)).numpy().tobytes())


def keep_writing(path: Path, stop: threading.Event) -> None:
    """In turn: replace by another file, cut and write again, and overwrite in place; the last two in pieces."""
    rng = random.Random(0)
    other = path.with_suffix(".new")
    for value in range(1, 1_000_000):
        if stop.wait(rng.uniform(0, 0.05)):
            return
        data = content(value)
        if value % 3 == 0:
            other.write_bytes(data)
            other.replace(path)
            continue
        with path.open("r+b") as file:
            if value % 3 == 1:
                file.truncate(len(data) // 2)
            for start in range(0, len(data), 50_000):
                file.write(data[start : start + 50_000])
                file.flush()
                stop.wait(0.002)


def test_a_file_that_is_written_to_is_read_whole_or_not_at_all(tmp_path):
    path, stop = tmp_path / "lora.safetensors", threading.Event()
    path.write_bytes(content(0))
    writer = threading.Thread(target=keep_writing, args=(path, stop))
    writer.start()
    try:
        outcomes = [read_values(path) for _ in range(200)]
    finally:
        stop.set()
        writer.join()
    assert [values for values in outcomes if len(values) > 1] == []
    assert len(set().union(*outcomes)) > 3, "the file is to change between the loads"


def read_values(path: Path) -> set[float]:
    """The values in all tensors: one, or none where the file was refused."""
    try:
        tensors = read_lora_file(path).tensors
    except (FileChangedError, IncompleteFileError):
        return set()
    return {float(value) for tensor in tensors.values() for value in tensor.unique()}


def test_a_file_that_changes_once_is_read_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def read(file):
        text = file.read()
        if text == b"old":
            path.write_bytes(b"new content")
        return text

    identity, text = read_unchanged(path, read)
    assert text == b"new content"
    assert identity.size == len(text)


def test_a_write_that_sets_the_time_back_is_noticed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.utime(path, (1e9, 1e9))

    def read(file):
        text = file.read()
        if text == b"old":
            time.sleep(SETTLING_S)
            path.write_bytes(b"new")
            os.utime(path, (1e9, 1e9))
        return text

    assert read_unchanged(path, read)[1] == b"new"


def test_a_file_that_never_rests_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0")
    with pytest.raises(FileChangedError, match="file is being written to"):
        read_unchanged(path, lambda file: path.write_bytes(file.read() + b"1"))
