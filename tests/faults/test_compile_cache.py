"""Compiled code on the disk that is damaged, can not be read or not be written: the picture is right all the same."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import codecache

from lib_lora.compile import code_cache
from lib_lora.compile.choose import prepare
from lib_lora.compile.code_cache import LIST, VARIABLE
from lib_lora.compile.inductor import Inductor

WAIT_SECONDS = 300
CALLS = 4
TOLERANCE = 1e-5
X = torch.linspace(-1, 1, 8).view(2, 4)
DAMAGES = {
    "cut off": lambda data: data[: len(data) // 2],
    "other bytes": lambda data: b"\xff" * len(data),
    "empty": lambda data: b"",
    "some bits": lambda data: data[:-9] + bytes(255 - byte for byte in data[-9:]),
}


class Toy(nn.Module):
    """One block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mid_block = nn.Sequential(nn.Linear(4, 4), nn.SiLU())

    def forward(self, x):
        return self.mid_block(x)


@pytest.fixture(autouse=True)
def start(monkeypatch):
    """What a new program knows of compiled code: nothing."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    code_cache._forget_loaded()
    yield
    code_cache._forget_loaded()


@torch.no_grad()
def draw(folder, before_calls=lambda: None):
    """Results of some calls, and how the model ran."""
    model = Toy().eval().requires_grad_(False)
    expected = model(X)
    handle = prepare(model, Inductor(folder))
    before_calls()
    for _ in range(CALLS):
        torch.testing.assert_close(model(X), expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert handle.wait(WAIT_SECONDS)
    status = handle.status
    handle.release()
    return status


def files(folder):
    """What torch wrote, but for locks."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]


def replace(path, data):
    """Not in place: what is loaded of a file is mapped."""
    path.unlink()
    path.write_bytes(data)


def damage(folder, how):
    """Damage all files of a folder but the list, which is told to be right."""
    for path in files(folder):
        if path.name != LIST:
            replace(path, DAMAGES[how](path.read_bytes()))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with the compiled code of an earlier program."""
    folder = tmp_path_factory.mktemp("good") / "compiled"
    before = os.environ.pop(VARIABLE, None)
    assert draw(folder).compiled == ("mid_block",)
    os.environ.pop(VARIABLE)
    yield folder
    if before is not None:
        os.environ[VARIABLE] = before


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "compiled"))


def code_of(folder):
    return [path.read_bytes() for path in files(folder) if path.suffix == ".so"]


def test_code_of_an_earlier_program_is_used(folder):
    before = {path: path.stat().st_mtime_ns for path in files(folder) if path.suffix in {".so", ".py"}}
    assert before
    assert draw(folder).compiled == ("mid_block",)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files_are_compiled_again(folder, how):
    damaged = {DAMAGES[how](data) for data in code_of(folder)}
    damage(folder, how)
    assert draw(folder).compiled == ("mid_block",)
    assert os.environ[VARIABLE] == str(folder)
    assert code_of(folder)
    assert not damaged & set(code_of(folder))


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\x00" * 9, b"[" * 100_000])
def test_files_that_no_list_names_are_not_used(folder, content):
    replace(folder / LIST, content or b"")
    if content is None:
        (folder / LIST).unlink()
    half = folder / "half.so"
    half.write_bytes(b"\x7fELF")
    prepare(Toy(), Inductor(folder)).release()
    assert files(folder) == [folder / LIST] * (content is not None)


@pytest.mark.parametrize("how", ["other bytes", "empty"])
def test_files_that_are_damaged_while_the_program_runs_are_compiled_again_elsewhere(folder, how):
    status = draw(folder, lambda: damage(folder, how))
    assert (status.compiled, status.reason) == (("mid_block",), "")
    assert Path(os.environ[VARIABLE]).parent == Path(tempfile.gettempdir())
    assert Path(os.environ[VARIABLE]) != folder


def test_damaged_files_in_a_folder_of_the_users_are_left_alone_and_compiled_again_elsewhere(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(folder))
    damage(folder, "other bytes")
    before = {path: path.read_bytes() for path in files(folder) if path.suffix == ".py"}
    status = draw(folder.parent / "ours")
    assert (status.compiled, status.reason) == (("mid_block",), "")
    assert {path: path.read_bytes() for path in before} == before
    assert not (folder.parent / "ours").exists()


def test_a_folder_that_vanishes_is_done_without(folder):
    def vanish():
        shutil.rmtree(folder)
        folder.write_bytes(b"")

    assert draw(folder, vanish).compiled == ("mid_block",)


def test_a_folder_that_can_not_be_made_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    assert draw(tmp_path / "file" / "compiled").compiled == ("mid_block",)
    assert [record.message for record in caplog.records if "is not kept until the next start" in record.message]


def test_a_folder_that_can_not_be_written_to_is_done_without(folder, monkeypatch, caplog):
    def refuse(path):
        raise code_cache.OutputError(f"the folder {path.name} can not be written to")

    monkeypatch.setattr(code_cache, "check_writable", refuse)
    assert draw(folder).compiled == ("mid_block",)
    assert "can not be written to" in caplog.text
    assert os.environ.get(VARIABLE) != str(folder)


@pytest.mark.newest  # torch 2.1 writes in another way
def test_a_disk_that_is_full_is_done_without(folder, monkeypatch):
    write = codecache.write_atomic

    def full(path_, *args, **kwargs):
        if Path(path_).is_relative_to(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path_, *args, **kwargs)

    def forget():
        for path in files(folder):
            path.unlink()
        monkeypatch.setattr(codecache, "write_atomic", full)

    assert draw(folder, forget).compiled == ("mid_block",)


@pytest.mark.newest
def test_where_nothing_can_be_written_the_model_stays_eager_and_says_why(folder, monkeypatch):
    def full(path_, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.rmtree(folder)
    monkeypatch.setattr(codecache, "write_atomic", full)
    status = draw(folder)
    assert status.compiled == ()
    assert status.reason.startswith("All of it runs eagerly.")
    assert "No space left" in status.reason
