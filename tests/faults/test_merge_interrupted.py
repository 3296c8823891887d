"""Merging that a full disk, a cancel, a kill or another writer ends on the way: all is there, or nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora.core.files import FileIdentity
from lib_lora.errors import FileChangedError, OutputError
from lib_lora.tools.given import given_files
from lib_lora.tools.merge import merge_loras
from tests.merge_models import BASE, LORA, diffusers_folder, output_beside_another, snapshot

ROOT = Path(__file__).parents[2]
CANCELS, KILLS = 50, 20
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such limits or signals")


@pytest.fixture
def out(tmp_path) -> Path:
    return output_beside_another(tmp_path)


@posix_only
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_limit_reached_at_any_size_leaves_the_folder_alone(tmp_path, out, kind):
    import resource

    model, target = (BASE, out) if kind == "file" else (diffusers_folder(tmp_path), out.parent / "merged")
    before, (soft, hard) = snapshot(out.parent), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 8, 50_000, *random.Random(0).sample(range(200_000, 1_000_000), 7)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OutputError, match="File too large"):
                merge_loras(model, given_files([str(LORA)]), target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert snapshot(out.parent) == before


@pytest.mark.parametrize("kind", ["file", "folder", "pickle"])
def test_a_cancel_at_any_time_leaves_the_folder_alone(tmp_path, out, kind):
    model, target = BASE, out
    if kind == "folder":
        model, target = diffusers_folder(tmp_path), out.parent / "merged"
    if kind == "pickle":
        model = tmp_path / "model.ckpt"
        torch.save(load_file(BASE), model)
    before, calls = snapshot(out.parent), list[int]()
    merge_loras(
        model, given_files([str(LORA)]), tmp_path / f"whole{target.suffix}", progress=lambda *n: calls.append(n[0])
    )
    times = {"file": CANCELS, "folder": CANCELS // 5, "pickle": 1}[kind]
    for last in random.Random(1).sample(calls, times):

        def cancel(done, _, last=last):
            if done >= last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge_loras(model, given_files([str(LORA)]), target, progress=cancel)
        assert snapshot(out.parent) == before


def test_a_model_that_is_written_to_meanwhile_is_noticed(tmp_path, out):
    model = Path(shutil.copy(BASE, tmp_path / "model.safetensors"))

    def touch(done, total):
        os.utime(model, ns=(1, FileIdentity.of(model).mtime_ns + 1))

    with pytest.raises(FileChangedError, match=r"model\.safetensors is being written to"):
        merge_loras(model, given_files([str(LORA)]), out, progress=touch)
    assert not out.exists()


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from lib_lora.tools.given import given_files
from lib_lora.tools.merge import merge_loras

torch.set_num_threads(1)
model, lora, target, kills = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
start = time.perf_counter()
merge_loras(model, given_files([lora]), target.with_name("whole.safetensors"))
duration, rng, outcomes = time.perf_counter() - start, random.Random(0), []
for _ in range(kills):
    child = os.fork()
    if child == 0:
        merge_loras(model, given_files([lora]), target)
        os._exit(0)
    time.sleep(rng.uniform(0, 1.5 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    outcomes.append(target.exists())
    if target.is_file():
        target.unlink()
    elif target.exists():
        target.rename(target.with_name(f"done {len(outcomes)}"))
print(outcomes.count(False), outcomes.count(True))
"""


@pytest.mark.newest
@posix_only
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_at_any_time_leaves_all_or_nothing(tmp_path, out, kind):
    model, target = (BASE, out) if kind == "file" else (diffusers_folder(tmp_path), out.parent / "merged")
    command = [sys.executable, "-c", KILLER, str(model), str(LORA), str(target), str(KILLS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    nothing, whole = map(int, done.stdout.split())
    assert nothing > 0, "some kills are to come before the end"
    assert nothing + whole == KILLS
    for folder in out.parent.glob("done*"):
        assert {file.name for file in folder.rglob("*.*")} == {"model.safetensors", "model_index.json"}
        assert load_file(folder / "unet" / "model.safetensors").keys()


def test_rests_of_killed_jobs_are_removed_after_a_day(out):
    stale = out.parent / f".tmp-{'0' * 16}"
    (stale / "unet").mkdir(parents=True)
    (stale / "unet" / "model.safetensors").write_bytes(b"half")
    os.utime(stale, (1, 1))
    merge_loras(BASE, given_files([str(LORA)]), out)
    assert not stale.exists()
