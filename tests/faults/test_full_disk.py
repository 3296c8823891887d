"""A disk of 64 MB that is full: what is told, and what is left on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_disks import NAMESPACE, can_mount

ROOT = Path(__file__).parents[2]

SAVER = """
import json, shutil, subprocess, sys
from pathlib import Path

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
sys.path.insert(0, sys.argv[2])

import torch
from lib_lora.core.saving import save_tensors
from lib_lora.errors import OutputError

path = folder / "lora.safetensors"
save_tensors(path, {"old": torch.arange(1_000_000.0)})
before = path.read_bytes()
told = []
real = shutil.disk_usage
for looks in (real, lambda _: real("/")._replace(free=1 << 40)):  # the second one does not see that the disk is small
    shutil.disk_usage = looks
    for megabytes in (64, 100):
        try:
            save_tensors(path, {"new": torch.ones(megabytes * 250_000)}, overwrite=True)
        except OutputError as error:
            told.append(str(error))
print(json.dumps({
    "told": told,
    "kept": path.read_bytes() == before,
    "there": [item.name for item in folder.iterdir()],
    "free": real(folder).free,
}))
"""


@pytest.mark.skipif(not can_mount(), reason="this system lets no process mount a small disk of its own")
def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path):
    command = [*NAMESPACE, sys.executable, "-c", SAVER, str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    result = json.loads(done.stdout)
    seen, unseen = result["told"][:2], result["told"][2:]
    assert len(result["told"]) == 4
    assert all("was not saved: it needs" in sentence for sentence in seen)
    assert all(sentence == "lora.safetensors was not saved: No space left on device" for sentence in unseen)
    assert result["kept"]
    assert result["there"] == ["lora.safetensors"]
    assert result["free"] > 58_000_000
