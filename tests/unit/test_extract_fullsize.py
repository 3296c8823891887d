"""Extraction on models of real size, whose files are holes: which layers, which families, how much memory."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import fullsize
import pytest
import torch

from lib_lora.core.header import TensorInfo, encode_header
from lib_lora.core.lora_names import kohya_name
from lib_lora.errors import BaseModelMismatchError, JobError
from lib_lora.tools.difference import open_pair
from lib_lora.tools.extract import extract

ROOT = Path(__file__).parents[2]
FAMILIES = fullsize.FAMILIES
MOST_MEMORY = 0.9
"""In GB: the largest layer, of 0.12 GB in float32, a few times, and what libraries load."""


def write_hollow(path, shapes):
    """A checkpoint of real size that takes no room on the disk: all its numbers are holes."""
    tensors, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        tensors[name] = TensorInfo(torch.float16, tuple(shape), begin, end)
    header = encode_header(tensors, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    return path


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    """family → a single file of real size; SD2's with the last layer that open_clip's files have."""
    folder = tmp_path_factory.mktemp("hollow")
    shapes = {family: dict(fullsize.single_file(family)) for family in FAMILIES}
    shapes["sd2"] |= {
        name.replace("resblocks.22.", "resblocks.23."): shape
        for name, shape in shapes["sd2"].items()
        if "resblocks.22." in name
    }
    return {family: write_hollow(folder / f"{family}.safetensors", shapes[family]) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_real_models_are_those_that_kohya_extracts(hollow, family):
    for convolutions in (False, True):
        pair = open_pair(hollow[family], hollow[family], convolutions=convolutions)
        found = {kohya_name(layer.layer.key, pair.family): list(layer.layer.shape) for layer in pair.layers}
        expected = fullsize.kohya_shapes(family)
        lierla = fullsize.facts(f"{family}_lora_names")["lierla"]
        assert found == (expected if convolutions else {name: expected[name] for name in lierla})


@pytest.mark.parametrize("pair", list(itertools.permutations(FAMILIES, 2)))
def test_models_of_different_families_are_refused_by_name(hollow, pair, tmp_path):
    with pytest.raises(
        BaseModelMismatchError, match=r"sd.+\.safetensors is SD.+ and sd.+\.safetensors is SD.+one family"
    ):
        extract(*(hollow[family] for family in pair), tmp_path / "out.safetensors", rank=4)
    assert not list(tmp_path.iterdir())


def test_families_whose_layers_are_not_known_are_refused(tmp_path):
    shapes = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "single_blocks.0.linear1.weight": (21504, 3072)}
    flux = write_hollow(tmp_path / "flux.safetensors", shapes)
    with pytest.raises(JobError, match="Flux; LoRAs can be extracted of SD1, SD2 and SDXL"):
        extract(flux, flux, tmp_path / "out.safetensors", rank=4)


PEAK = """
import sys
from pathlib import Path
from lib_lora.errors import JobError
from lib_lora.tools.extract import extract

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6

before, model = peak(), Path(sys.argv[1])
try:
    extract(model, model, model.with_name("lora.safetensors"), rank=4, conv_rank=4)
except JobError as error:
    print(peak() - before, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory of a process is told by Linux only")
def test_a_few_layers_are_in_memory_not_the_models(hollow):
    command = [sys.executable, "-c", PEAK, str(hollow["sd1"])]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S603
    assert "nothing to extract" in told
    assert float(told.split()[0]) < MOST_MEMORY < hollow["sd1"].stat().st_size / 1e9
