"""Bad files: refused in time, in a sentence that names the file and the fault, or read exactly."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import time
import zipfile

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lib_lora.core.files import FileIdentity, data_sha256, map_checkpoint, read_header, read_lora_file
from lib_lora.core.saving import save_tensors
from lib_lora.errors import CorruptFileError, FileError, ForeignFileError, IncompleteFileError, PickleRefusedError
from tests.bad_files import LONGEST_REFUSAL_S, MEAN_REFUSAL_S, assert_refused, entry, raw_file, refusal, write_all

posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such file")


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
