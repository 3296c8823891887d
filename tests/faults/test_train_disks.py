"""Trainings on a disk that fills up, and on one that can only be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_disks import NAMESPACE, can_mount

pytestmark = [
    pytest.mark.newest,
    pytest.mark.slow,
    pytest.mark.skipif(not can_mount(), reason="this system lets no process mount a small disk of its own"),
]

TESTS = Path(__file__).parents[1]
DISKS = """
import json, shutil, subprocess, sys
from pathlib import Path
from PIL import Image
from train_runs import load_tiny, options_for, same, tensors_of, tiny_folder, write_pictures
from lib_lora.errors import PrefuseError
from lib_lora.train.trainer import train

folder = Path(sys.argv[1])
disk, model, pictures = folder / "disk", tiny_folder(folder), write_pictures(folder / "pictures")
disk.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
prompts = folder / "prompts.txt"
prompts.write_text("a b")
given = {"max_train_steps": 4, "save_state_every_n_steps": 1, "sample_prompts": prompts, "sample_every_n_steps": 3}
real = shutil.disk_usage


def fill(room):
    (disk / "filler").write_bytes(bytes(max(0, real(disk).free - room)))


def run(out, progress=lambda now: None, **more):
    options, draw = options_for(pictures, out, **given, **more), lambda *_: Image.new("RGB", (64, 64))
    try:
        return train(load_tiny(model), options, progress=progress, draw_picture=draw)
    except PrefuseError as error:
        return str(error)


def states():
    return sorted(path.name for path in (disk / "made-state").glob("*"))


whole = tensors_of(run(folder / "whole"))
told, kept, same_bits = [], [], []
for looks in (real, lambda path: real(path)._replace(free=1 << 40)):  # the second does not see how small the disk is
    shutil.disk_usage = looks
    for full_at in (1, 2, 4):
        told.append(run(disk, lambda now: fill(4096) if now.step == full_at else None))
        kept.append(states())
        (disk / "filler").unlink()
        made = run(disk, **({"resume": disk / "made-state"} if kept[-1] else {}))
        same_bits.append(same(tensors_of(made), whole))
        shutil.rmtree(disk / "made-state")
        (disk / "made.safetensors").unlink()
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
read_only = run(disk)
sys.stdout.write(json.dumps({"told": told, "kept": kept, "same": same_bits, "read only": read_only}))
"""


def test_a_disk_that_fills_up_ends_the_training_with_a_sentence_and_it_goes_on_when_there_is_room(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    command = [*NAMESPACE, sys.executable, "-c", DISKS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    seen, unseen = result["told"][:3], result["told"][3:]
    assert all("was not saved: it needs" in sentence and "the disk is full" in sentence for sentence in seen)
    assert all(sentence.endswith("was not saved: No space left on device") for sentence in unseen)
    assert [sentence.split()[0] for sentence in seen] == [
        "step-00000001.safetensors",
        "step-00000002.safetensors",
        "made.safetensors",
    ]
    last_two = ["step-00000002.safetensors", "step-00000003.safetensors"]
    assert result["kept"] == [[], ["step-00000001.safetensors"], last_two] * 2
    assert result["same"] == [True] * 6
    assert "Read-only file system" in result["read only"]
