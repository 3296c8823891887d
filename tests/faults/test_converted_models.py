"""Converting models: what is refused, and that neither links nor cancelled jobs leave anything behind."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from ldm_files import write_checkpoint
from safetensors.torch import load_file
from tiny_pipelines import TinyModel, make_tiny, write_folder, write_tokenizer

from lib_lora.__main__ import main
from lib_lora.core.saving import save_tensors
from lib_lora.errors import FileError, ForeignFileError, ModelError, OutputError
from lib_lora.tools.convert_checkpoint import to_diffusers, to_single

if TYPE_CHECKING:
    from pathlib import Path

REFUSED = 1
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows lets users make no links")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyModel:
    return make_tiny("sd1", tmp_path_factory.mktemp("sd1") / "config")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    return write_folder(tiny, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "in/model")
    return tmp_path / "in/model"


@pytest.fixture
def file(tiny, tmp_path) -> Path:
    return write_checkpoint(tmp_path / "in/model.safetensors", tiny.tensors)


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out/new"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(item.relative_to(folder)): item.read_bytes() if item.is_file() else None for item in folder.rglob("*")}


def break_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def lose_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def list_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("[1]")


def lose_part(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def be_flux(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')


def lose_shard(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))


def cut(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def have_variants(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    file.rename(file.with_name("diffusion_pytorch_model.ema.safetensors"))


def inpaint(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_tensors(file, load_file(file) | {"conv_in.weight": torch.zeros(4, 9, 3, 3)}, overwrite=True)


def have_no_class(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"unet": 5, "vae": "x", "text_encoder": [], "text_encoder_2": {}}')


FOLDERS = {
    have_no_class: "text_encoder_2 holds no",
    break_index: "model_index.json can not be read",
    lose_index: "model_index.json can not be read",
    list_index: "holds no JSON object",
    lose_part: "vae holds no .safetensors weights without a variant",
    be_flux: "is no SD1, SD2 or SDXL model: it has no unet",
    lose_shard: "unet is incomplete: some of its shards are missing",
    cut: "is incomplete",
    have_variants: "variants there: ema, fp16",
    inpaint: "an inpainting model",
}


@pytest.mark.parametrize(("spoil", "sentence"), FOLDERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_that_can_not_become_a_file_is_refused(folder, out, spoil, sentence):
    spoil(folder)
    before = snapshot(out.parents[1])
    with pytest.raises((ModelError, FileError), match=sentence):
        to_single(folder, out)
    assert snapshot(out.parents[1]) == before


def test_a_variant_that_is_not_there_is_refused(folder, out):
    with pytest.raises(ModelError, match=r"no \.safetensors weights of variant fp16; variants there: no variant"):
        to_single(folder, out, variant="fp16")


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("first_stage_model.", "holds no VAE"),
        ("cond_stage_model.", "no text encoder"),
        ("model.diffusion", "no tensor"),
    ],
)
def test_a_file_that_is_no_whole_model_is_refused(tiny, out, tmp_path, lost, sentence):
    tensors = {name: tensor for name, tensor in tiny.tensors.items() if not name.startswith(lost)}
    write_checkpoint(tmp_path / "part.safetensors", tensors)
    with pytest.raises(ModelError, match=sentence):
        to_diffusers(tmp_path / "part.safetensors", out, config=tiny.config)
    assert not list(out.parent.iterdir())


def test_a_file_of_another_size_than_the_configuration_is_refused_with_the_numbers(file, out):
    with pytest.raises(
        ModelError, match=r"conv_in\.weight of the unet has the size 4, .* block_out_channels 320; .*--config"
    ):
        to_diffusers(file, out)
    assert not list(out.parent.iterdir())


def test_a_web_page_and_a_configuration_that_is_none_are_refused(tiny, file, out, tmp_path):
    page = tmp_path / "page.safetensors"
    page.write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(ForeignFileError):
        to_diffusers(page, out)
    with pytest.raises(ModelError, match="can not be read as a configuration"):
        to_diffusers(file, out, config=tmp_path)
    shutil.copytree(tiny.config, tmp_path / "config")
    (tmp_path / "config/text_encoder/config.json").write_text("{}")
    with pytest.raises(ModelError, match="no complete configuration: it has no architectures"):
        to_diffusers(file, out, config=tmp_path / "config")
    assert not list(out.parent.iterdir())


@posix_only
@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_nothing_is_replaced_and_no_link_is_followed(tiny, file, folder, out, tmp_path, kind):
    victim = tmp_path / "victim"
    victim.mkdir()
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_bytes(b"old")
    else:
        out.symlink_to(victim if kind == "link" else tmp_path / "nothing")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError):
        to_diffusers(file, out, config=tiny.config)
    with pytest.raises(OutputError):
        to_single(folder, out, overwrite=kind != "file")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cancelled_job_leaves_nothing(tiny, file, folder, out, share):
    def cancel(done: int, total: int) -> None:
        if done > share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_diffusers(file, out, config=tiny.config, progress=cancel)
    with pytest.raises(KeyboardInterrupt):
        to_single(folder, out, progress=cancel)
    assert not list(out.parent.iterdir())


def test_progress_counts_every_byte_of_every_part(tiny, file, out):
    told: list[tuple[int, int]] = []
    to_diffusers(file, out, config=tiny.config, progress=lambda *numbers: told.append(numbers))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (sum(path.stat().st_size for path in out.rglob("*.safetensors")),) * 2


def test_the_command_makes_a_folder_with_a_tokenizer_and_a_file_of_it(tiny, file, out, tmp_path, capsys):
    words = write_tokenizer(tmp_path / "words")
    options = ["--config", str(tiny.config), "--tokenizer", str(words), "--prediction", "v", "--json"]
    assert main(["convert", "--model", str(file), "--to", "diffusers", "--out", str(out), *options]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["layout"], made["base_model"], made["left_out"]) == ("diffusers", "SD 1.x", {})
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    assert (out / "tokenizer/vocab.json").read_bytes() == (words / "vocab.json").read_bytes()
    one = tmp_path / "one.safetensors"
    assert main(["convert", "--model", str(out), "--to", "single", "--out", str(one)]) == 0
    told = f"{one}: {len(tiny.tensors)} tensors of SD 1.x, {one.stat().st_size / 1e6:.2f} MB\n"
    assert capsys.readouterr().out == told
    assert main(["convert", "--model", str(out), "--to", "single", "--out", str(one)]) == REFUSED
    assert main(["convert", "--model", str(out), "--to", "peft", "--out", str(one)]) == REFUSED
    assert "single or diffusers, not to peft" in capsys.readouterr().err
