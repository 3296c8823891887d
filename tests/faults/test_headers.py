"""Headers that lie, are too large, name things twice, or hold metadata of any kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.core.files import map_checkpoint, read_header, read_lora_file
from lib_lora.core.header import CHECKPOINT_LIMITS, LORA_LIMITS, parse_header
from lib_lora.errors import CorruptFileError, IncompleteFileError
from tests.bad_files import (
    ALLOWED_KB,
    HEADER_DOS_S,
    LONGEST_REFUSAL_S,
    LONGEST_SENTENCE,
    assert_refused,
    entry,
    raw_file,
    refusal,
    write_all,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the peak memory of a process is told by Linux only")


# Headers that lie

FOUR = bytes(4)
LIES = {
    "length beyond the format's limit": (100_000_001).to_bytes(8, "little") + b"{" + bytes(100),
    "length 2^63": (2**63).to_bytes(8, "little") + b"{" + bytes(100),
    "length 2^64 - 1": b"\xff" * 8 + b"{" + bytes(100),
    "length beyond what is read for a LoRA": (33_000_000).to_bytes(8, "little") + b"{" + bytes(100),
    "length zero": bytes(8) + b"{}",
    "length beyond the file": (1000).to_bytes(8, "little") + b'{"a":',
    "not UTF-8": raw_file(b'{"\xff\xfe":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "not JSON": raw_file(b'{"a":{"dtype":"F32",}}', FOUR),
    "a list": raw_file(b'["a"]', FOUR),
    "two JSON values": raw_file(b"{}{}"),
    "overlap": raw_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "same place": raw_file({"a": entry(0, 4), "b": entry(0, 4)}, FOUR),
    "hole": raw_file({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "hole at the start": raw_file({"a": entry(4, 8)}, bytes(8)),
    "negative offset": raw_file({"a": entry(-4, 0)}, FOUR),
    "end before begin": raw_file({"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}, FOUR),
    "shape whose product overflows": raw_file({"a": entry(0, 4, [2**32, 2**32, 2**32])}, FOUR),
    "empty shape that overflows": raw_file({"a": entry(0, 0, [0, 2**62, 2**62])}),
    "shape of another size": raw_file({"a": entry(0, 4, [2])}, FOUR),
    "negative shape": raw_file({"a": entry(0, 4, [-1, -1])}, FOUR),
    "fractional shape": raw_file({"a": entry(0, 4, [1.0])}, FOUR),
    "boolean shape": raw_file({"a": entry(0, 4, [True])}, FOUR),
    "33 dimensions": raw_file({"a": entry(0, 4, [1] * 33)}, FOUR),
    "unknown dtype": raw_file({"a": entry(0, 4, dtype="F33")}, FOUR),
    "dtype that is no text": raw_file({"a": entry(0, 4, dtype=["F32"])}, FOUR),
    "missing shape": raw_file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR),
    "missing offsets": raw_file({"a": {"dtype": "F32", "shape": [1]}}, FOUR),
    "three offsets": raw_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, FOUR),
    "a tensor that is a text": raw_file({"a": "F32"}, FOUR),
    "lone surrogate in a name": raw_file(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "deep nesting": raw_file(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    "deep nesting in the metadata": raw_file(b'{"__metadata__":{"a":' + b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_002),
    "a number of ten million digits": raw_file(b'{"a":' + b"1" * 10_000_000 + b"}"),
    "ten million empty lists": raw_file(b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"),
    "ten million numbers": raw_file(b'{"a":{"dtype":"F32","shape":[' + b"1," * 10_000_000 + b"1]}}"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    error, seconds = refusal(write_all(tmp_path, [LIES[lie]])[0])
    assert isinstance(error, CorruptFileError | IncompleteFileError)
    assert seconds < LONGEST_REFUSAL_S
    assert str(error).startswith("0.safetensors ")
    assert str(error).isprintable()
    assert len(str(error)) < LONGEST_SENTENCE


def peak_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


@linux_only
def test_refusing_takes_little_memory(tmp_path):
    huge = raw_file({"a": entry(0, 2**50)})
    paths = write_all(tmp_path, [*LIES.values(), huge, huge + bytes(1000)])
    for path in paths:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
        before = peak_kb()
        for read in (read_lora_file, map_checkpoint):
            refusal(path, read)
        assert peak_kb() - before < ALLOWED_KB


def test_a_hundred_thousand_tensors_are_refused_at_once(tmp_path):
    entries = (f'"t{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for index in range(100_000))
    usual = f"{{{','.join(entries)}}}".encode()
    escaped = usual.replace(b"data_offsets", b"data\\u005foffsets")
    refusals = [refusal(path) for path in write_all(tmp_path, [raw_file(usual), raw_file(escaped)])]
    assert all("more than 20,000 tensors" in str(error) for error, _ in refusals)
    assert refusals[0][1] < HEADER_DOS_S
    assert refusals[1][1] < LONGEST_REFUSAL_S


def test_twenty_thousand_tensors_and_megabytes_of_metadata_are_read(tmp_path):
    header = {f"t{index}": entry(0, 0) for index in range(20_000)} | {"__metadata__": {"thumbnail": "A" * 5_000_000}}
    (tmp_path / "large.safetensors").write_bytes(raw_file(header))
    assert len(read_header(tmp_path / "large.safetensors").tensors) == 20_000


def test_a_checkpoint_may_have_a_larger_header_than_a_lora(tmp_path):
    header = {"__metadata__": {"merge recipe": "A" * 33_000_000}, "a": entry(0, 4)}
    [path] = write_all(tmp_path, [raw_file(header, FOUR)])
    error, _ = refusal(path)
    assert "header of 33.0 MB, at most 32.0 are read" in str(error)
    assert map_checkpoint(path)["a"].tolist() == [0.0]
    assert read_header(path, CHECKPOINT_LIMITS).tensors.keys() == {"a"}


REPEATED = (
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"shape":[1,1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8],"data_offsets":[0,4]}}',
    b'{"__metadata__":{"a":"1"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"a":"2"}}',
)


@pytest.mark.parametrize("header", REPEATED)
def test_a_name_that_stands_twice_is_refused(tmp_path, header):
    [error] = assert_refused(tmp_path, [raw_file(header, FOUR)])
    assert isinstance(error, CorruptFileError)
    assert "two entries named" in str(error)


# Metadata

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=5) | json_values)
def test_no_metadata_stops_a_file_from_being_read(metadata):
    raw = json.dumps({"__metadata__": metadata, "a": entry(0, 4)}).encode()
    header = parse_header(raw, 8 + len(raw) + 4, LORA_LIMITS, "x")
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in header.metadata.items())
    assert json.dumps(header.metadata, ensure_ascii=False).encode()
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    assert bool(header.unreadable) != texts


def test_metadata_that_is_no_text_is_told(tmp_path):
    raw = b'{"__metadata__":{"epoch":3,"time":1e400,"date":"1e400","tags":{"a":[1]},"x":"\\ud800","x":null}}'
    [path] = write_all(tmp_path, [raw_file(raw)])
    header = read_header(path)
    assert header.metadata == {"epoch": "3", "time": "Infinity", "date": "1e400", "x": "null"}
    assert set(header.unreadable) == {"epoch", "time", "tags", "x"}
    assert dict(read_lora_file(path).metadata) == header.metadata
