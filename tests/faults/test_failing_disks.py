"""A disk that fails, or a process that is killed, while a file is saved: the new file whole, or the old one."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lib_lora.core import large_writes, replacing
from lib_lora.core.saving import save_tensors
from lib_lora.errors import OutputError
from tests.old_files import NEW, SMALL_BLOCK, old_file, snapshot

ROOT = Path(__file__).parents[2]
KILLS = 100
TWO_DAYS = 2 * 24 * 3600
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files or limits")


@pytest.fixture(params=["small", "large"])
def path(tmp_path, request, monkeypatch) -> Path:
    return old_file(tmp_path, monkeypatch, request.param)


@contextmanager
def file_size_limit(size: int):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix_only
def test_a_limit_reached_at_any_size_leaves_the_old_file_alone(path):
    before = snapshot(path.parent)
    save_tensors(path.parent / "whole.safetensors", NEW)
    whole = (path.parent / "whole.safetensors").stat().st_size
    (path.parent / "whole.safetensors").unlink()
    sizes = [0, 1, 7, 8, 9, 100, *random.Random(0).sample(range(101, whole - 1), 13), whole - 1]
    for size in sizes:
        with (
            file_size_limit(size),
            pytest.raises(OutputError, match=r"lora\.safetensors was not saved: File too large"),
        ):
            save_tensors(path, NEW, overwrite=True)
        assert snapshot(path.parent) == before
    assert len(sizes) == 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_of_the_disk_leaves_the_old_file_alone(path, monkeypatch, code):
    before, write, calls = snapshot(path.parent), replacing.TempFile.write, []

    def write_once(temp, data):
        calls.append(data)
        if len(calls) > 1:
            raise OSError(code, os.strerror(code))
        write(temp, data)

    monkeypatch.setattr(replacing.TempFile, "write", write_once)
    with pytest.raises(OutputError, match=os.strerror(code)):
        save_tensors(path, NEW, overwrite=True)
    assert snapshot(path.parent) == before


def test_a_full_disk_is_told_before_writing(path, monkeypatch):
    before = snapshot(path.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match=r"needs 0\.1 MB, the disk is full"):
        save_tensors(path, NEW, overwrite=True)
    assert snapshot(path.parent) == before


def test_a_disk_that_gives_back_other_bytes_is_noticed(path, monkeypatch):
    before, write = snapshot(path.parent), replacing.TempFile.write

    def write_wrong(temp, data):
        write(temp, bytes(len(data)) if len(data) == 80_000 else data)

    monkeypatch.setattr(replacing.TempFile, "write", write_wrong)
    with pytest.raises(OutputError, match="other bytes for tensor 'new'"):
        save_tensors(path, NEW, overwrite=True)
    assert snapshot(path.parent) == before


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_leaves_the_old_file_alone(path, monkeypatch, interrupt):
    before = snapshot(path.parent)

    def publish(temp, target):
        raise interrupt

    monkeypatch.setattr(replacing.TempFile, "publish", publish)
    with pytest.raises(interrupt):
        save_tensors(path, NEW, overwrite=True)
    assert snapshot(path.parent) == before


def test_a_disk_that_fails_in_the_writing_thread_leaves_the_old_file_alone(path, monkeypatch):
    monkeypatch.setattr(replacing, "LARGE_BYTES", 1)
    monkeypatch.setattr(large_writes, "BLOCK_BYTES", SMALL_BLOCK)
    before, write, calls = snapshot(path.parent), large_writes.write_all, []

    def write_twice(file, data):
        calls.append(len(data))
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    monkeypatch.setattr(large_writes, "write_all", write_twice)
    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
        save_tensors(path, NEW, overwrite=True)
    assert calls == [SMALL_BLOCK] * 3
    assert snapshot(path.parent) == before
    assert not [thread for thread in threading.enumerate() if "prefuse-writer" in thread.name]


@pytest.mark.parametrize("refused_at", ["open", "write"])
def test_a_disk_that_can_not_be_written_past_its_cache_is_written_through_it(path, monkeypatch, refused_at):
    monkeypatch.setattr(replacing, "LARGE_BYTES", 1)
    monkeypatch.setattr(large_writes, "BLOCK_BYTES", SMALL_BLOCK)
    bypass, some, refused = large_writes.bypass_cache, FileIO.write, []

    def bypass_cache(file, *, wanted):
        return False if wanted and refused_at == "open" else bypass(file, wanted=wanted)

    class Refusing(FileIO):
        def write(self, data):
            if refused_at == "write" and not refused:
                refused.append(len(data))
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return some(self, data)

    monkeypatch.setattr(large_writes, "bypass_cache", bypass_cache)
    monkeypatch.setattr(replacing, "FileIO", Refusing)
    save_tensors(path, NEW, overwrite=True)
    assert {name: tensor.tolist() for name, tensor in load_file(path).items()} == {
        k: v.tolist() for k, v in NEW.items()
    }
    assert bool(refused) == (refused_at == "write")


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from lib_lora.core import large_writes, replacing
from lib_lora.core.saving import save_tensors

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
replacing.LARGE_BYTES, large_writes.BLOCK_BYTES = int(sys.argv[3]), 8192
path = folder / "lora.safetensors"
tables = [{str(i): torch.full((25_000,), float(10 * version + i)) for i in range(8)} for version in range(2)]
contents = []
for table in tables:
    start = time.perf_counter()
    save_tensors(path, table, overwrite=True)
    duration = time.perf_counter() - start
    contents.append(path.read_bytes())
rng, outcomes, current = random.Random(0), {"old": 0, "new": 0}, 1
for _ in range(kills):
    child = os.fork()
    if child == 0:
        save_tensors(path, tables[1 - current], overwrite=True)
        os._exit(0)
    time.sleep(rng.uniform(0, 2 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = contents.index(path.read_bytes())
    outcomes["new" if found != current else "old"] += 1
    current = found
print(outcomes["old"], outcomes["new"], *sorted({name[:5] for name in os.listdir(folder)}))
"""


@pytest.mark.newest
@posix_only
@pytest.mark.parametrize("large_bytes", [1, replacing.LARGE_BYTES], ids=["large", "small"])
def test_a_kill_at_any_time_leaves_the_old_or_the_new_file(tmp_path, large_bytes):
    command = [sys.executable, "-c", KILLER, str(tmp_path), str(KILLS), str(large_bytes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    old, new, *names = done.stdout.split()
    assert int(old) + int(new) == KILLS
    assert int(old) > 0, "some kills are to come before the end"
    assert int(new) > 0, "some kills are to come after the end"
    assert set(names) <= {".tmp-", "lora."}


def test_rests_of_killed_processes_are_removed_after_a_day(path):
    stale, young = (path.parent / f".tmp-{digit * 16}" for digit in "0a")
    foreign = path.parent / ".tmp-my own notes"
    for file in (stale, young, foreign):
        file.touch()
    for file in (stale, foreign):
        os.utime(file, (time.time() - TWO_DAYS,) * 2)
    save_tensors(path, NEW, overwrite=True)
    assert [file.exists() for file in (stale, young, foreign)] == [False, True, True]
