"""The demo: a grid of pictures, what the LoRAs did, and what they cost."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

import lib_lora.hosts.standalone.demo_run as demo
from lib_lora.core.files import read_lora_file
from lib_lora.hosts.standalone.demo import LORA_DIR
from lib_lora.hosts.standalone.timings import similar_loras
from lib_lora.tools.grid import GAP, ROW_LABEL_WIDTH, draw_grid, wrap

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The whole demo with few steps and rounds: the picture and what it said."""
    lines: list[str] = []
    out = tmp_path_factory.mktemp("demo") / "new/demo.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SCENES", demo.SCENES[:1])
        for name, value in {"STEPS": 3, "STEP_ROUNDS": 1, "STEP_CALLS": 1, "SWITCH_ROUNDS": 1}.items():
            patch.setattr(demo, name, value)
        threads = torch.get_num_threads()
        demo.run_demo(out, lines.append)
        torch.set_num_threads(threads)
    return out, "\n".join(lines)


def test_the_grid_has_a_column_for_every_way_to_use_the_loras(shown):
    with Image.open(shown[0]) as grid:
        assert grid.width == ROW_LABEL_WIDTH + len(demo.COLUMNS) * (demo.CELL + GAP)
        picture = np.asarray(grid)
    y = picture.shape[0] - GAP - demo.CELL
    starts = [ROW_LABEL_WIDTH + column * (demo.CELL + GAP) for column in range(len(demo.COLUMNS))]
    cells = [picture[y : y + demo.CELL, x : x + demo.CELL].astype(int) for x in starts]
    assert np.abs(cells[demo.FUSED] - cells[demo.HOOKED]).max() <= 1
    others = [cell for column, cell in enumerate(cells) if column != demo.HOOKED]
    assert all(np.abs(one - other).max() > 8 for n, one in enumerate(others) for other in others[n + 1 :])


def test_the_report_of_every_picture_is_told(shown):
    said = shown[1]
    assert said.count("a red circle on a blue background") == len(demo.COLUMNS)
    assert "+ stripes at 1: LoRA" in said
    assert "layers hooked" in said
    assert "\n  ! " not in said


def test_the_tables_have_every_number_of_loras_in_both_modes(shown):
    for count in demo.LORA_COUNTS:
        assert re.search(rf"^ +{count} +[\d.]+ ms  x +[\d.]+ +[\d.]+ ms  x +[\d.]+", shown[1], re.MULTILINE)
    for change in ("5 LoRAs to 5 others", "one strength of 5", "back to no LoRA"):
        assert re.search(rf"{change} +[\d.]+ ms", shown[1])


def test_the_weights_are_back_at_the_end(shown):
    assert "bit for bit" in shown[1].splitlines()[-1]
    assert "NOT" not in shown[1]


def test_similar_loras_have_the_patterns_shapes_and_other_numbers(tmp_path):
    pattern = LORA_DIR / "stripes.safetensors"
    assert similar_loras(pattern, tmp_path, 2) == ["random1", "random2"]
    files = [
        read_lora_file(path) for path in (pattern, tmp_path / "random1.safetensors", tmp_path / "random2.safetensors")
    ]
    for name, tensor in files[0].tensors.items():
        assert {(file.tensors[name].shape, file.tensors[name].dtype) for file in files} == {
            (tensor.shape, tensor.dtype)
        }
        is_factor = tensor.ndim >= 2
        assert torch.equal(files[1].tensors[name], files[2].tensors[name]) is not is_factor


def test_pictures_keep_their_colours_in_the_grid():
    colours = [["red", "lime"], ["blue", "black"]]
    grid = draw_grid(["a", "b"], ["c", "d"], [[Image.new("RGB", (4, 4), name) for name in row] for row in colours], 16)
    for row in range(2):
        for column in range(2):
            x = ROW_LABEL_WIDTH + column * (16 + GAP) + 8
            y = grid.height - (2 - row) * (16 + GAP) + 8
            assert grid.getpixel((x, y)) == Image.new("RGB", (1, 1), colours[row][column]).getpixel((0, 0))


def test_labels_are_wrapped_and_their_own_line_breaks_kept():
    assert wrap("one two three\nfour", 80) == "one two\nthree\nfour"
