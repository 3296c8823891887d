"""Changing what a header says: the tensors stay where and what they are, or nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lib_lora.__main__ import main
from lib_lora.core.files import data_sha256, read_header
from lib_lora.core.header import CHECKPOINT_LIMITS, TensorInfo, encode_header
from lib_lora.core.saving import save_tensors
from lib_lora.errors import FileChangedError, FileError, JobError, OutputError
from lib_lora.tools.metadata import edit_metadata, read_metadata

GOLDEN = Path(__file__).parents[1] / "golden" / "sd1"
OLD = {"author": "me", "ss_v2": "False"}
REFUSED, USAGE = 1, 2
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows lets users make no links")


@pytest.fixture
def file(tmp_path) -> Path:
    """A file as nobody of us would lay it out: small dtypes first, unaligned, with empty tensors between."""
    kinds = {"z": (torch.uint8, (3,)), "none": (torch.float32, (0, 4)), "half": (torch.float16, (2, 3))}
    kinds |= {"b": (torch.bool, (5,)), "a": (torch.float32, (2, 2)), "scalar": (torch.int64, ())}
    layout, end = {}, 0
    for name, (dtype, shape) in kinds.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        layout[name] = TensorInfo(dtype, shape, begin, end)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(encode_header(layout, OLD) + bytes(index % 2 for index in range(end)))
    return path


def data_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(item.relative_to(folder)): item.read_bytes() if item.is_file() else None for item in folder.rglob("*")}


def test_texts_are_set_and_removed_and_every_tensor_lies_where_it_lay(file, tmp_path):
    out = tmp_path / "new.safetensors"
    before = snapshot(tmp_path)
    edit = edit_metadata(file, {"author": "you", "ä\n": "日本\x01", "ss_v2": "False"}, out=out)
    assert (edit.set, edit.removed, edit.path) == (("author", "ä\n"), (), out)
    assert read_metadata(out) == {"author": "you", "ss_v2": "False", "ä\n": "日本\x01"} == edit.metadata
    assert read_header(out).tensors == read_header(file).tensors
    assert data_of(out) == data_of(file)
    assert {name: content for name, content in snapshot(tmp_path).items() if name != out.name} == before


@pytest.mark.parametrize("name", ["lora_A", "lora_E_c3lier", "base"])
def test_hashes_that_kohya_wrote_stay_right(name, tmp_path):
    out = tmp_path / "x.safetensors"
    edit_metadata(GOLDEN / f"{name}.safetensors", {"x": "y" * 10_000}, out=out)
    assert data_of(out) == data_of(GOLDEN / f"{name}.safetensors")
    assert read_metadata(out).get("sshs_model_hash", data_sha256(out)) == data_sha256(out)


def test_a_file_is_changed_in_place_only_if_that_is_allowed(file, tmp_path):
    data, before = data_of(file), snapshot(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        edit_metadata(file, {"a": "b"})
    assert snapshot(tmp_path) == before
    edit_metadata(file, {"a": "b"}, ["author", "ss_v2"], overwrite=True)
    assert read_metadata(file) == {"a": "b"}
    assert data_of(file) == data
    edit_metadata(file, {}, ["a"], overwrite=True)
    assert read_metadata(file) == {}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("changes", "removed", "sentence"),
    [
        ({}, ["author", "nobody"], "has no metadata 'nobody' to remove"),
        ({}, [], "nothing to set or to remove"),
        ({"": "x"}, [], "metadata needs a name"),
        ({"x": "\ud800"}, [], "broken Unicode"),
        ({"\udfff": "x"}, [], "broken Unicode"),
        ({"x": "y" * 33_000_000}, [], "header of 33.0 MB, at most 32"),
    ],
)
def test_what_no_reader_would_take_is_refused_and_nothing_is_written(file, tmp_path, changes, removed, sentence):
    before = snapshot(tmp_path)
    with pytest.raises(JobError, match=sentence):
        edit_metadata(file, changes, removed, overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_text_of_a_million_commas_is_refused_by_what_would_read_it(file, tmp_path):
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="more than 2,000,000 values"):
        edit_metadata(file, {"x": "," * 2_000_001}, overwrite=True)
    assert snapshot(tmp_path) == before


@posix_only
@pytest.mark.parametrize("kind", ["link", "dangling link", "link in place", "folder", "pipe"])
def test_a_target_that_is_no_plain_file_is_never_written_through(file, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim.safetensors"
    save_tensors(victim, {"v": torch.ones(2)}, OLD)
    out, source = tmp_path / "out.safetensors", file
    if kind == "folder":
        out.mkdir()
    elif kind == "pipe":
        os.mkfifo(out)
    else:
        out.symlink_to(outside / "nothing" if kind == "dangling link" else victim)
        source = out if kind == "link in place" else file
    before = victim.read_bytes()
    with pytest.raises(OutputError, match="is a link, a folder or a device"):
        edit_metadata(source, {"a": "b"}, out=out, overwrite=True)
    assert victim.read_bytes() == before
    assert list(outside.iterdir()) == [victim]


@posix_only
def test_the_other_name_of_a_hard_link_keeps_its_content(file, tmp_path):
    twin = tmp_path / "twin.safetensors"
    os.link(file, twin)
    before = twin.read_bytes()
    edit_metadata(file, {"a": "b"}, overwrite=True)
    assert twin.read_bytes() == before


@pytest.mark.parametrize("rewrite", [True, False])
def test_a_source_that_changes_meanwhile_is_noticed(file, tmp_path, rewrite):
    old = file.read_bytes()

    def meddle(done: int, _: int) -> None:
        if done:
            file.write_bytes(old[:-1] + b"\x07" if rewrite else old + b"more")

    with pytest.raises(FileChangedError if rewrite else FileError):
        edit_metadata(file, {"a": "b"}, out=tmp_path / "new.safetensors", progress=meddle)
    assert list(tmp_path.iterdir()) == [file]


@posix_only
def test_a_disk_that_is_full_at_any_byte_leaves_the_old_file_alone(file, tmp_path):
    import resource

    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = range(0, file.stat().st_size, 40)
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OutputError, match=r"odd\.safetensors was not saved: File too large"):
                edit_metadata(file, {"a": "b"}, overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert snapshot(tmp_path) == before
    assert len(sizes) > 10


def test_a_cancelled_edit_leaves_the_folder_as_it_was(file, tmp_path):
    before = snapshot(tmp_path)

    def cancel(done: int, _: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_metadata(file, {"a": "b"}, overwrite=True, progress=cancel)
    assert snapshot(tmp_path) == before


@pytest.fixture
def command(capsys):
    """Run `metadata`; gives exit code, stdout, stderr."""

    def run(*arguments: object):
        code = main(["metadata", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_command_shows_all_or_one_text(command, file):
    assert command(file) == (0, "author  me\nss_v2  False\n", "")
    assert command(file, "--get", "author") == (0, "me\n", "")
    code, stdout, _ = command(file, "--json")
    assert (code, json.loads(stdout)) == (0, OLD)
    code, stdout, stderr = command(file, "--get", "x")
    assert (code, stdout, stderr.count("\n")) == (REFUSED, "", 1)
    assert "has no metadata 'x'" in stderr


def test_a_text_can_not_write_to_the_terminal(command, file):
    edit_metadata(file, {"evil": "\x1b]0;pwned\x07\u202ex"}, overwrite=True)
    code, stdout, _ = command(file)
    assert code == 0
    assert not set(stdout) & set("\x1b\x07\u202e")


def test_the_command_sets_removes_and_reads_long_texts_from_files(command, file, tmp_path):
    text = tmp_path / "note.txt"
    text.write_text("two\nlines = 日", encoding="utf-8")
    out = tmp_path / "out.safetensors"
    options = ("--set", "a=b=c", "--set", "empty=", "--set-file", f"note={text}", "--remove", "author")
    code, stdout, stderr = command(file, *options, "--out", out, "--json")
    assert (code, stderr) == (0, "")
    expected = {"ss_v2": "False", "a": "b=c", "empty": "", "note": "two\nlines = 日"}
    assert json.loads(stdout)["metadata"] == expected == read_metadata(out)
    assert data_of(out) == data_of(file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--set", "a=b"), "exists already"),
        (("--remove", "nobody", "--force"), "has no metadata 'nobody' to remove"),
        (("--out", "copy.safetensors"), "nothing to set or to remove"),
        (("--set-file", "a=/nowhere/at/all"), "No such file"),
        (("--set", "a=b", "--out", "/nowhere/at/all.safetensors"), "can not be written to"),
    ],
)
def test_refusals_are_one_sentence_and_nothing_is_written(command, file, tmp_path, arguments, sentence):
    before = snapshot(tmp_path)
    code, stdout, stderr = command(file, *arguments)
    assert (code, stdout, stderr.count("\n")) == (REFUSED, "", 1)
    assert sentence in stderr
    assert snapshot(tmp_path) == before


def test_a_text_without_a_name_is_wrong_usage(file):
    with pytest.raises(SystemExit) as raised:
        main(["metadata", str(file), "--set", "=x"])
    assert raised.value.code == USAGE


def test_a_checkpoint_of_any_size_of_header_is_shown(tmp_path):
    path = tmp_path / "many.safetensors"
    save_tensors(path, {f"w{index}": torch.zeros(1) for index in range(30_000)}, OLD)
    assert read_metadata(path) == OLD
    assert len(read_header(path, CHECKPOINT_LIMITS).tensors) == 30_000
