"""What a merge takes of memory, mapped files included: some layers, not the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_MEMORY = 80_000_000  # two blocks of 16 MiB that are written, the LoRA, scratch memory, and some layers

PEAK = """
import sys
from pathlib import Path
import torch
from lib_lora.core.saving import save_tensors
from lib_lora.tools.given import given_files
from lib_lora.tools.merge import merge_loras

def memory(field):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))

folder, layers = Path(sys.argv[1]), int(sys.argv[2])
model, lora = {}, {}
others = ("input_blocks.0.0", "input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in", "output_blocks.0.0.x")
for path in (*others, *(f"input_blocks.1.1.transformer_blocks.{number}.attn1.to_q" for number in range(layers))):
    model[f"model.diffusion_model.{path}.weight"] = torch.zeros(1280, 1280).half()
    lora[f"lora_unet_{path.replace('.', '_')}.lora_up.weight"] = torch.ones(1280, 2).half()
    lora[f"lora_unet_{path.replace('.', '_')}.lora_down.weight"] = torch.ones(2, 1280).half()
save_tensors(folder / "model.safetensors", model)
save_tensors(folder / "lora.safetensors", lora)
del model, lora
torch.ones(8, 8).half().float() @ torch.ones(8, 8)  # whatever torch loads once
given = given_files([str(folder / "lora.safetensors")])
Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
before = memory("VmRSS")
report = merge_loras(folder / "model.safetensors", given, folder / "out.safetensors")
print(report.layers, memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory of a process is told by Linux only")
def test_a_merge_keeps_some_layers_in_memory_not_the_model(tmp_path):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PEAK, str(tmp_path), "80"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    layers, peak = map(int, done.stdout.split())
    size = (tmp_path / "out.safetensors").stat().st_size
    assert layers == 84
    assert peak < MOST_MEMORY < size / 3
