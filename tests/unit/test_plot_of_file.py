"""The picture of a LoRA file."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from lib_lora.__main__ import main
from lib_lora.core.saving import save_tensors
from lib_lora.errors import JobError, OutputError
from lib_lora.tools.inspect import inspect_file
from lib_lora.tools.plots.file import draw_file, save_plot
from lib_lora.tools.plots.style import COLOURS

GOLDEN = Path(__file__).parents[1] / "golden/sd1"
IN_LAYER = "lora_unet_down_blocks_0_attentions_0_proj_in"
OUT_LAYER = "lora_unet_up_blocks_1_attentions_0_proj_in"
PIXEL_ERROR = 0.03
NARROWEST = 2 * 560


def lora(folder, in_norm: float = 1.0, out_norm: float = 1.0, rank: int = 2) -> Path:
    """Two layers of given norms in two blocks, of one rank and twice that."""
    tensors = {}
    for name, norm, own in ((IN_LAYER, in_norm, rank), (OUT_LAYER, out_norm, 2 * rank)):
        up, down = torch.zeros(8, own), torch.zeros(own, 8)
        up[0, 0], down[0, 0] = norm, 1.0
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(float(own))
    save_tensors(folder / "lora.safetensors", tensors, overwrite=True)
    return folder / "lora.safetensors"


def drawn(path: Path) -> np.ndarray:
    with Image.open(BytesIO(draw_file(inspect_file(path)).png())) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def extent(pixels: np.ndarray, kind: str) -> int:
    """Height in pixels of the bar of a block, in the upper plot."""
    rows = (pixels[: int(0.57 * len(pixels))] == ImageColor.getrgb(COLOURS[kind])).all(axis=2).any(axis=1)
    return int(rows.sum())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_bars_are_as_high_as_the_norms(tmp_path, ratio):
    pixels = drawn(lora(tmp_path, in_norm=4.0, out_norm=4.0 * ratio))
    assert extent(pixels, "OUT") / extent(pixels, "IN") == pytest.approx(ratio, abs=PIXEL_ERROR)


def test_dots_stand_at_the_ranks(tmp_path):
    """The lower half has no more than two dots, the one of the higher rank above the other."""
    pixels = drawn(lora(tmp_path))
    lower = pixels[int(0.62 * len(pixels)) :]
    near = {kind: np.abs(lower - ImageColor.getrgb(COLOURS[kind])).max(axis=2) < 12 for kind in ("IN", "OUT")}
    centre = {kind: np.argwhere(found).mean(axis=0) for kind, found in near.items()}
    assert all(found.sum() > 100 for found in near.values())
    assert centre["OUT"][0] < centre["IN"][0]
    assert centre["OUT"][1] > centre["IN"][1]


def test_the_picture_is_opaque_white_with_dark_text_for_light_and_dark_pages(tmp_path):
    with Image.open(BytesIO(draw_file(inspect_file(lora(tmp_path))).png())) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGBA"))
    assert (pixels[..., 3] == 255).all()
    assert (pixels[[0, -1]] == 255).all()
    assert (pixels[: len(pixels) // 12, :, :3].sum(axis=2) < 200).any()


@pytest.mark.parametrize("name", ["lora_A", "lora_D_c3lier", "resize_E_svratio2_savefp16"])
def test_files_of_kohyas_are_drawn(name):
    assert drawn(GOLDEN / f"{name}.safetensors").shape[1] >= NARROWEST


def test_names_with_signs_of_markup_are_drawn(tmp_path):
    found = inspect_file(lora(tmp_path))
    for name in ("a$b$c", "$", r"\alpha_{", "ß漢字", "x" * 400):
        assert draw_file(replace(found, path=f"{tmp_path}/{name}.safetensors")).png()


def test_layers_whose_norm_needs_the_model_are_told_not_guessed(tmp_path):
    found = inspect_file(lora(tmp_path))
    unknown = replace(found, layers=tuple(replace(layer, norm=None) for layer in found.layers))
    with Image.open(BytesIO(draw_file(unknown).png())) as image:
        assert extent(np.asarray(image.convert("RGB")).astype(int), "IN") == 0


def test_a_checkpoint_is_refused(tmp_path, capsys):
    assert main(["inspect", str(GOLDEN / "base.safetensors"), "--plot", str(tmp_path / "a.png")]) == 1
    assert "nothing to draw" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_draws_and_tells_as_before(tmp_path, capsys):
    command = ["inspect", str(GOLDEN / "lora_A.safetensors"), "--plot", str(tmp_path / "a.png")]
    assert main(command) == 0
    assert "norm by block" in capsys.readouterr().out
    before = (tmp_path / "a.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_only_pngs_are_written(tmp_path):
    found = inspect_file(lora(tmp_path))
    with pytest.raises(JobError, match=r"must end in \.png"):
        save_plot(found, tmp_path / "a.jpg")
    with pytest.raises(OutputError):
        save_plot(found, tmp_path / "nowhere/a.png")


def test_without_matplotlib_a_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(JobError, match="pip install matplotlib"):
        draw_file(inspect_file(lora(tmp_path)))
