"""Saving: the new file whole, or the old one untouched; never another file, never a rest."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lib_lora.core import replacing
from lib_lora.core.saving import LazyTensor, check_output, check_writable, output_path, save_bytes, save_tensors
from lib_lora.errors import OutputError, UnsafePathError
from tests.old_files import NEW, old_file, snapshot

ROOT = Path(__file__).parents[2]
SLACK_KB = 12_000
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files or limits")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the peak memory of a process is told by Linux only")


@pytest.fixture(params=["small", "large"])
def path(tmp_path, request, monkeypatch) -> Path:
    return old_file(tmp_path, monkeypatch, request.param)


# Targets that are not replaced


def test_an_older_file_is_replaced_only_if_asked_for(path):
    before = snapshot(path.parent)
    for save in (lambda: save_tensors(path, NEW), lambda: save_bytes(path, b"new")):
        with pytest.raises(OutputError, match="exists already"):
            save()
        assert snapshot(path.parent) == before
    save_tensors(path, NEW, overwrite=True)
    assert load_file(path).keys() == NEW.keys()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_came_into_being_meanwhile_is_not_replaced(path, monkeypatch):
    target, write = path.with_name("second.safetensors"), replacing.TempFile.write

    def write_late(temp, data):
        target.write_bytes(b"someone else's")
        write(temp, data)

    monkeypatch.setattr(replacing.TempFile, "write", write_late)
    with pytest.raises(OutputError, match="exists already"):
        save_tensors(target, NEW)
    assert target.read_bytes() == b"someone else's"
    assert len(list(path.parent.iterdir())) == 2


@posix_only
@pytest.mark.parametrize("kind", ["link to a file", "dangling link", "link to a folder", "folder", "pipe"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_is_no_file_is_refused(path, kind, overwrite):
    outside = path.parent.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    target = path.with_name("target.safetensors")
    make = {
        "link to a file": lambda: target.symlink_to(outside / "file"),
        "dangling link": lambda: target.symlink_to(outside / "nothing"),
        "link to a folder": lambda: target.symlink_to(outside),
        "folder": target.mkdir,
        "pipe": lambda: os.mkfifo(target),
    }
    make[kind]()
    before = snapshot(path.parent.parent)
    with pytest.raises(OutputError, match="choose another name"):
        save_tensors(target, NEW, overwrite=overwrite)
    assert snapshot(path.parent.parent) == before


@posix_only
def test_replacing_one_name_of_a_file_leaves_its_other_name_alone(path):
    outside = path.parent.parent / "outside"
    outside.hardlink_to(path)
    before = outside.read_bytes()
    save_tensors(path, NEW, overwrite=True)
    assert outside.read_bytes() == before
    assert load_file(path).keys() == NEW.keys()


# Names and folders

HOSTILE = (
    *("", ".", "..", "...", " ", " a", "a ", "a.", ".a", ".tmp-0", "~/../a", "a/b", "a\\b", "/a", "\\a", "a/", "./a"),
    *("../a", "../../a", "..\\a", "..\\..\\a", "/etc/passwd", "/a/b", "//host/share/a", "\\\\host\\share\\a"),
    *("C:a", "C:\\a", "c:/a", "a:b", "a::$DATA", "a\0b", "\0", "a\nb", "a\r", "a\tb", "a\x1bb", "a\x7f", "a\x85b"),
    *("CON", "con", "NUL", "nul.txt", "PRN", "AUX", "aux.a.b", "COM1", "com9.x", "LPT1", "COM¹", "CONIN$", "conout$"),
    *("NUL .txt", "a<b", "a>b", 'a"b', "a|b", "a?b", "a*b", "a\u202eb", "a\u2066b", "a\u2028b", "a\ud800b"),
    *("n" * 300, "墨" * 100, "../" * 100 + "a", "a/../../b", "subfolder/../../../a"),
)


def test_hostile_names_lead_nowhere(tmp_path):
    folder = tmp_path / "parent" / "out"
    folder.mkdir(parents=True)
    assert len(HOSTILE) >= 60
    for name in HOSTILE:
        with pytest.raises(UnsafePathError) as caught:
            save_bytes(output_path(folder, name), b"data", overwrite=True)
        assert str(caught.value).isprintable()
    assert snapshot(tmp_path) == {"parent": None, "parent/out": None}


@posix_only
def test_a_name_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "a.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(UnsafePathError, match="link"):
        output_path(tmp_path, "a")


def test_a_folder_that_can_not_be_written_to_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o555)
    folders = [tmp_path / "missing", tmp_path / "file", tmp_path / "nul\0", *(Path(name) for name in ("/proc", "/sys"))]
    if getattr(os, "geteuid", lambda: 0)() != 0:  # the superuser writes everywhere
        folders.append(tmp_path / "locked")
    for folder in folders:
        with pytest.raises(OutputError, match=f"the folder {folder.name.rstrip(chr(0))}.? can not be written to"):
            check_writable(folder)
        with pytest.raises(OutputError):
            save_tensors(folder / "a.safetensors", NEW)
    check_writable(tmp_path)
    assert {item.name for item in tmp_path.iterdir()} == {"file", "locked"}


# Tensors of every kind


def awkward_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    shared = torch.nn.Parameter(torch.ones(3, 3))
    with torch.inference_mode():
        inference = torch.ones(2)
    return {
        "transposed": base.t(),
        "sliced": base[1:3, ::2],
        "overlapping": base[:2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "parameter": shared,
        "tied parameter": shared,
        "number": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "one of a column": torch.arange(6.0).reshape(3, 2)[:1, 1],
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negated": torch.tensor([1 + 2j]).conj().imag,
        "inference": inference,
    }


@pytest.mark.newest
def test_shared_and_scattered_tensors_are_saved_whole(tmp_path):
    tensors = awkward_tensors()
    save_tensors(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach()), name


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex128)], ids=str
)
def test_a_tensor_that_can_not_be_stored_is_refused_by_name(path, tensor):
    before = snapshot(path.parent)
    with pytest.raises(OutputError, match="'odd one' can not be stored"):
        save_tensors(path, {**NEW, "odd one": tensor}, overwrite=True)
    assert snapshot(path.parent) == before


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, {"a": "\ud800"}, {1: "a"}])
def test_metadata_that_is_no_text_is_refused(path, metadata):
    before = snapshot(path.parent)
    with pytest.raises(OutputError, match="was not saved"):
        save_tensors(path, NEW, metadata, overwrite=True)
    assert snapshot(path.parent) == before


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_tensor_name_that_no_file_can_hold_is_refused(path, name):
    before = snapshot(path.parent)
    with pytest.raises(OutputError, match="was not saved"):
        save_tensors(path, {name: torch.ones(1)}, overwrite=True)
    assert snapshot(path.parent) == before


PEAK = """
import sys
from pathlib import Path
import torch
from lib_lora.core.saving import save_tensors

def memory_kb(field):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))

path = Path(sys.argv[1]) / "a.safetensors"
tensors = {str(index): torch.ones(1000, 1000).t() for index in range(12)}
save_tensors(path, {"0": tensors["0"]})  # whatever torch loads once
Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
before = memory_kb("VmHWM")
save_tensors(path, tensors, overwrite=True)
print(memory_kb("VmHWM") - before)
"""


@linux_only
def test_saving_copies_one_tensor_at_a_time(tmp_path):
    # with this setting freed memory goes back to the system at once, and is not counted
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    assert int(done.stdout) < SLACK_KB, "twelve tensors have 48 MB"


def test_small_files_are_saved_byte_for_byte(tmp_path):
    save_bytes(tmp_path / "a.json", b'{"a": 1}')
    save_bytes(tmp_path / "empty", b"")
    assert snapshot(tmp_path) == {"a.json": b'{"a": 1}', "empty": b""}


def test_a_lazy_tensor_is_gone_before_the_next_is_made(path):
    made: list[weakref.ref[torch.Tensor]] = []

    def make(value):
        assert [ref for ref in made if ref() is not None] == []
        tensor = torch.full((8, 8), float(value))
        made.append(weakref.ref(tensor))
        return tensor

    lazy = {str(value): LazyTensor(torch.float32, (8, 8), partial(make, value)) for value in range(5)}
    save_tensors(path, lazy, overwrite=True)
    assert len(made) == 5
    assert {name: tensor[0, 0].item() for name, tensor in load_file(path).items()} == {str(v): v for v in range(5)}


def test_progress_counts_the_bytes_and_may_stop_the_job(path):
    before, seen = snapshot(path.parent), []

    def stop(done, total):
        seen.append((done, total))
        if done * 2 >= total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_tensors(path, {name: torch.ones(16) for name in "abcd"}, overwrite=True, progress=stop)
    assert seen == [(64, 256), (128, 256)]
    assert snapshot(path.parent) == before


def test_an_output_is_checked_before_the_work(path, tmp_path, monkeypatch):
    check_output(tmp_path / "new.safetensors")
    with pytest.raises(OutputError, match="exists already"):
        check_output(path)
    check_output(path, overwrite=True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OutputError, match=r"needs 2\.0 MB and the disk has 1\.0 MB"):
        check_output(path, 2_000_000, overwrite=True)
