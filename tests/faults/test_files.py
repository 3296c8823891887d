"""Bad files: refused in time, in a sentence that names the file and the fault, or read exactly."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from lib_lora.core.files import FileIdentity, data_sha256, map_checkpoint, read_header, read_lora_file
from lib_lora.core.header import CHECKPOINT_LIMITS, LORA_LIMITS, parse_header
from lib_lora.core.opening import read_unchanged
from lib_lora.core.saving import save_tensors
from lib_lora.errors import (
    CorruptFileError,
    FileChangedError,
    FileError,
    ForeignFileError,
    IncompleteFileError,
    PickleRefusedError,
)

LONGEST_REFUSAL_S = 1.0
MEAN_REFUSAL_S = 0.05
HEADER_DOS_S = 0.1
SETTLING_S = 0.03
"""After this long the time of a file's last write is trusted at once, so that tests measure the refusal alone."""
ALLOWED_KB = 200_000
LONGEST_SENTENCE = 700
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the peak memory of a process is told by Linux only")
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such file")


def raw_file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def lora_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layers = [f"lora_unet_down_blocks_{index}_attentions_0_proj_in" for index in range(4)]
    downs = {f"{layer}.lora_down.weight": torch.randn(4, 16, dtype=torch.float16) for layer in layers}
    ups = {f"{layer}.lora_up.weight": torch.randn(16, 4, dtype=torch.float16) for layer in layers}
    return downs | ups | {f"{layer}.alpha": torch.tensor(4.0) for layer in layers}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    save_tensors(path, lora_tensors(), {"ss_network_dim": "4", "ss_tag_frequency": '{"a": {"cat": 3}}'})
    return path.read_bytes()


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


# Truncated files


def test_a_file_cut_at_any_place_is_refused_as_incomplete(tmp_path, good):
    places = [*range(65), *random.Random(1).sample(range(65, len(good)), 135)]
    paths = write_all(tmp_path, [good[:place] for place in places])
    refusals = [refusal(path) for path in paths]
    assert len(refusals) == 200
    assert all(isinstance(error, IncompleteFileError) for error, _ in refusals)
    assert all(path.name in str(error) for path, (error, _) in zip(paths, refusals, strict=True))
    assert sum(seconds for _, seconds in refusals) / 200 < MEAN_REFUSAL_S
    assert max(seconds for _, seconds in refusals) < LONGEST_REFUSAL_S


def test_an_incomplete_file_is_told_with_both_sizes(tmp_path):
    header = raw_file({"a": entry(0, 144_100_000)})
    [error] = assert_refused(tmp_path, [header + bytes(41_200_000 - len(header))])
    assert "incomplete: 41.2 of 144.1 MB" in str(error)


def test_a_file_longer_than_its_header_says_is_refused(tmp_path, good):
    [error] = assert_refused(tmp_path, [good + b"123"])
    assert isinstance(error, IncompleteFileError)
    assert "3 bytes longer" in str(error)


# Files that are something else


def torch_file(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, **options)
    return buffer.getvalue()


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "text")
    return buffer.getvalue()


FOREIGN = (
    ("web page", b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"),
    ("web page", b"\xef\xbb\xbf<html lang='en'><body>404</body></html>"),
    ("web page", b"\n\n  <!-- moved --><HTML>Too many requests</HTML>"),
    ("web page", "<html><body>503</body></html>".encode("utf-16")),
    ("JSON", b'{"error": "Invalid credentials", "code": 401}'),
    ("JSON", b'[{"error": "not found"}]'),
    ("git-lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 151110872\n"),
    ("zip archive", zip_file()),
    ("pickle", pickle.dumps({"a": 1}, protocol=4)),
    ("gzip", gzip.compress(b"x" * 100)),
    ("PNG", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"),
    ("empty", b""),
    ("pickle", torch_file()),
    ("pickle", torch_file(_use_new_zipfile_serialization=False)),
    ("pickle", b"cos\nsystem\n(S'true'\ntR."),
    ("text", b"Access to this file needs a login."),
    ("GGUF", b"GGUF\x03\x00\x00\x00\x01\x00\x00\x00"),
)


def test_a_file_that_is_something_else_is_named_as_what_it_is(tmp_path):
    errors = assert_refused(tmp_path, [content for _, content in FOREIGN])
    assert [word for (word, _), error in zip(FOREIGN, errors, strict=True) if word not in str(error)] == []
    kinds = {"empty": IncompleteFileError, "pickle": PickleRefusedError}
    assert all(
        isinstance(error, kinds.get(word, ForeignFileError)) for (word, _), error in zip(FOREIGN, errors, strict=True)
    )


def test_noise_is_refused_as_no_safetensors_file(tmp_path):
    [error] = assert_refused(tmp_path, [b"\x00\xff\x00\xff" * 20])
    assert isinstance(error, CorruptFileError)


def test_a_pickle_is_refused_with_what_to_do(tmp_path):
    [error] = assert_refused(tmp_path, [torch_file()])
    assert "python -m lib_lora convert-pickle 0.safetensors" in str(error)


def test_the_content_decides_and_not_the_suffix(tmp_path, good):
    tensors = ["good.pt", "good.ckpt", "good.SAFETENSORS", "good.sft", "good", "good.txt"]
    others = {"pickle.safetensors": torch_file(), "page.safetensors": b"<html></html>"}
    for name in tensors:
        (tmp_path / name).write_bytes(good)
        assert len(read_lora_file(tmp_path / name).tensors) == 12
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((PickleRefusedError, ForeignFileError)):
            read_lora_file(tmp_path / name)


# Corruption


def mutant(good: bytes, seed: int) -> bytes:
    """The good file after one to four random edits, most of them in the header."""
    rng = random.Random(seed)
    data = bytearray(good)
    header_end = 8 + int.from_bytes(good[:8], "little")
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(header_end if rng.random() < 0.8 else len(data), len(data)))
        edit = rng.randrange(5)
        if edit == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif edit == 1:
            data[place] = rng.randrange(256)
        elif edit == 2:
            del data[place : place + rng.randint(1, 8)]
        elif edit == 3:
            data[place:place] = rng.randbytes(rng.randint(1, 8))
        else:
            data[place : place + 1] = rng.choice(b'0123456789[]{},:"').to_bytes(1, "little")
    return bytes(data)


def same_tensors(ours, theirs) -> bool:
    def flat(tensor):
        return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist()

    return {name: flat(ours[name]) for name in ours} == {name: flat(theirs[name]) for name in theirs}


def test_a_mutated_file_is_refused_or_read_as_the_library_reads_it(tmp_path, good):
    paths = write_all(tmp_path, [mutant(good, seed) for seed in range(500)])
    loaded = 0
    for path in paths:
        start = time.thread_time()
        try:
            tensors = read_lora_file(path).tensors
        except FileError as error:
            assert path.name in str(error)
            continue
        finally:
            assert time.thread_time() - start < LONGEST_REFUSAL_S
        loaded += 1
        try:
            assert same_tensors(tensors, load_file(path))
        except SafetensorError as error:
            assert "metadata" in str(error).lower() or "invalid type" in str(error), path.read_bytes()[:2000]
    assert 0 < loaded < 250


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


# Paths that are no files


@posix_only
def test_whatever_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "missing", tmp_path / "nul\0", tmp_path / ("n" * 300)]
    for path in paths:
        for read in (read_lora_file, read_header, map_checkpoint, data_sha256, FileIdentity.of):
            error, seconds = refusal(path, read)
            assert seconds < LONGEST_REFUSAL_S
            assert str(error).isprintable()


@posix_only
def test_a_file_is_read_through_links(tmp_path, good):
    (tmp_path / "file.safetensors").write_bytes(good)
    (tmp_path / "soft.safetensors").symlink_to("file.safetensors")
    (tmp_path / "hard.safetensors").hardlink_to(tmp_path / "file.safetensors")
    identities = [read_lora_file(path).identity for path in tmp_path.iterdir()]
    assert len({(identity.inode, identity.size, identity.mtime_ns) for identity in identities}) == 1


def test_a_name_that_can_not_be_printed_is_told_in_a_sentence_that_can(tmp_path):
    path = tmp_path / "line\nbreak\x1b[31m.safetensors"
    path.write_bytes(b"<html>")
    error, _ = refusal(path)
    assert str(error).isprintable()


# Files that change while they are read


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
