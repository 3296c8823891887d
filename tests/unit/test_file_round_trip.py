"""What is written is what is read, and what the safetensors library reads and writes."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_lora.core.files import data_sha256, map_checkpoint, read_header, read_lora_file
from lib_lora.core.header import DTYPES
from lib_lora.core.saving import output_path, save_tensors
from lib_lora.errors import UnsafePathError

MEGABYTE = 1_000_000
NOTICEABLE_KB = 2_000
EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
shapes = st.lists(st.integers(0, 4), max_size=4)


def random_tensor(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """Random bytes, so NaN and every other bit pattern too; booleans are 0 or 1."""
    count = int(torch.tensor([*shape, 1]).prod()) * dtype.itemsize
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(tensors) -> dict:
    return {name: bits(tensors[name]) for name in tensors}


tables = st.dictionaries(names, st.builds(random_tensor, st.sampled_from(list(DTYPES.values())), shapes), max_size=6)


@pytest.mark.newest
@EXAMPLES
@given(tables, st.dictionaries(texts, texts, max_size=3))
def test_the_library_reads_what_we_write(tmp_path, tensors, metadata):
    path = tmp_path / "ours.safetensors"
    save_tensors(path, tensors, metadata, overwrite=True)
    assert all_bits(load_file(path)) == all_bits(tensors)
    with safe_open(path, "pt") as theirs:
        assert (theirs.metadata() or {}) == metadata
    ours = read_lora_file(path)
    assert all_bits(ours.tensors) == all_bits(map_checkpoint(path)) == all_bits(tensors)
    assert ours.metadata == metadata


@pytest.mark.newest
@EXAMPLES
@given(tables, st.dictionaries(texts, texts, min_size=1, max_size=3))
def test_we_read_what_the_library_writes(tmp_path, tensors, metadata):
    path = tmp_path / "theirs.safetensors"
    save_file(tensors, path, metadata)
    ours = read_lora_file(path)
    assert all_bits(ours.tensors) == all_bits(map_checkpoint(path)) == all_bits(tensors)
    assert ours.metadata == metadata


def test_every_dtype_of_this_torch_survives(tmp_path):
    tensors = {name: random_tensor(dtype, [3, 5]) for name, dtype in DTYPES.items()}
    save_tensors(tmp_path / "all.safetensors", tensors)
    assert {"BOOL", "U8", "F16", "BF16", "F32", "F8_E4M3", "F8_E5M2"} <= tensors.keys()
    assert all_bits(read_lora_file(tmp_path / "all.safetensors").tensors) == all_bits(tensors)


def test_the_layout_is_the_library_s_byte_for_byte(tmp_path):
    tensors = {
        "b": torch.ones(3),
        "a": torch.zeros(2, 2),
        "half": torch.ones(5, dtype=torch.float16),
        "x": torch.ones(1),
    }
    save_tensors(tmp_path / "ours.safetensors", tensors, {"key": "value"})
    save_file(tensors, tmp_path / "theirs.safetensors", {"key": "value"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_data_begins_at_a_multiple_of_eight_bytes(tmp_path):
    for length in range(9):
        path = tmp_path / f"{length}.safetensors"
        save_tensors(path, {"n" * (length + 1): torch.ones(1)})
        assert read_header(path).data_start % 8 == 0


def test_a_tensor_that_the_file_does_not_align_is_copied(tmp_path):
    path = tmp_path / "odd.safetensors"
    header = (
        b'{"byte":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"word":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},'
        b'"none":{"dtype":"F64","shape":[0,3],"data_offsets":[1,1]}}'
    )
    assert (len(header) + 8) % 4, "the header itself is to be odd"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    for tensors in (read_lora_file(path).tensors, map_checkpoint(path)):
        assert tensors["word"].tolist() == [1.5, -2.0]
        assert tensors["word"].data_ptr() % 4 == 0
        assert tensors["byte"].tolist() == [7]
        assert tensors["none"].shape == (0, 3)


def test_tensors_are_views_of_one_buffer(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_tensors(path, {str(index): torch.full((100,), float(index)) for index in range(10)})
    storages = {tensor.untyped_storage().data_ptr() for tensor in read_lora_file(path).tensors.values()}
    assert len(storages) == 1


def test_the_hash_is_of_the_bytes_after_the_header(tmp_path):
    tensors = {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.int8)}
    save_tensors(tmp_path / "one.safetensors", tensors, {"title": "one"})
    save_tensors(tmp_path / "two.safetensors", tensors, {"title": "another title, a longer one"})
    expected = hashlib.sha256(tensors["a"].numpy().tobytes() + tensors["b"].numpy().tobytes()).hexdigest()
    assert data_sha256(tmp_path / "one.safetensors") == data_sha256(tmp_path / "two.safetensors") == expected


def test_the_identity_tells_one_content_from_another(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_tensors(path, {"a": torch.ones(1)})
    first = read_lora_file(path).identity
    assert first == read_lora_file(path).identity
    save_tensors(path, {"a": torch.zeros(1)}, overwrite=True)
    assert read_lora_file(path).identity != first


def test_a_header_tells_the_place_of_every_tensor(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_tensors(path, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}, {"k": "v"})
    header = read_header(path)
    assert header.metadata == {"k": "v"}
    assert header.file_size == path.stat().st_size
    assert header.tensors["b"] == (torch.float16, (4,), 24, 32)
    assert path.read_bytes()[header.data_start :][:24] == torch.arange(6.0).numpy().tobytes()


def memory_kb(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


@pytest.mark.skipif(sys.platform != "linux", reason="the kinds of memory of a process are told by Linux only")
def test_a_mapped_checkpoint_takes_no_anonymous_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {str(index): torch.full((2_000_000,), float(index)) for index in range(8)})
    map_checkpoint(path)["0"].sum()  # whatever torch allocates once
    before = memory_kb("RssAnon")
    tensors = map_checkpoint(path)
    assert [float(tensors[str(index)][-1]) for index in range(8)] == list(range(8))
    assert float(tensors["7"].sum()) == 14_000_000
    assert memory_kb("RssAnon") - before < NOTICEABLE_KB


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.ones(10)})
    tensors = map_checkpoint(path)
    tensors["a"].zero_()
    assert load_file(path)["a"].tolist() == [1.0] * 10


def test_a_lora_beyond_the_limit_is_mapped_instead_of_read(tmp_path, monkeypatch):
    path = tmp_path / "large.safetensors"
    save_tensors(path, {"a": torch.arange(1000.0)})
    monkeypatch.setattr("lib_lora.core.files.READ_LIMIT", 1000)
    file = read_lora_file(path)
    assert torch.equal(file.tensors["a"], torch.arange(1000.0))
    assert not isinstance(file.tensors, dict)


def test_a_mapped_file_is_a_mapping(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.ones(1), "b": torch.ones(2)}, {"k": "v"})
    tensors = map_checkpoint(path)
    assert list(tensors) == list(tensors.header.tensors)
    assert len(tensors) == 2
    assert "c" not in tensors
    assert tensors.header.metadata == {"k": "v"}
    assert tensors.identity.size == path.stat().st_size
    with pytest.raises(KeyError):
        tensors["c"]


@pytest.mark.parametrize(
    "name", ["ink", "ink v1.5", "ink.final", "墨", "naïve", "a+b,(c)", "%2e%2e", "-rf", "CONsole", "ink😀"]
)
def test_plain_names_become_paths_in_the_folder(tmp_path, name):
    assert output_path(tmp_path, name) == tmp_path / f"{name}.safetensors"
    assert output_path(str(tmp_path), name, ".png").suffix == ".png"


def test_a_name_is_measured_in_bytes(tmp_path):
    longest = (255 - len(".safetensors")) // 3
    (tmp_path / output_path(tmp_path, "墨" * longest).name).touch()
    with pytest.raises(UnsafePathError):
        output_path(tmp_path, "墨" * (longest + 1))


def test_a_new_file_has_the_permissions_that_any_new_file_gets(tmp_path):
    old = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
        (tmp_path / "plain").touch()
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
