"""Merging LoRAs into checkpoints: exactly what the prompt would have fused, and nothing else is touched."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lib_lora.__main__ import main
from lib_lora.catalog import LoraCatalog
from lib_lora.core.files import data_sha256
from lib_lora.core.keymap import KeyMap
from lib_lora.session import LoraSession
from lib_lora.tools.given import given_files, prompted_loras
from lib_lora.tools.merge import merge_loras
from tests.golden.kohya_model import HERE, build
from tests.merge_models import different_layers, write_as, write_mixed_lora
from tests.tiny_pipelines import make_tiny, write_folder

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.newest

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
BASE = HERE / "base.safetensors"
PASSED_THROUGH = ("first_stage_model.", "alphas_cumprod", "position_ids")


def merge(model: Path, loras: list[str], out: Path, **options):
    return merge_loras(model, given_files(loras), out, **options)


def report_tensor(report, name: str) -> torch.Tensor:
    with safe_open(report.path, "pt") as file:
        return file.get_tensor(name)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# What the prompt would have fused


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_file_holds_the_bits_that_the_prompt_fuses(tmp_path, dtype):
    model = write_as(BASE, tmp_path / "model.safetensors", DTYPES[dtype])
    unet, te = build(DTYPES[dtype])
    components = {"unet": unet, "te1": te}
    folder = tmp_path / "loras"
    folder.mkdir()
    write_mixed_lora(folder / "mixed.safetensors", components)
    write_mixed_lora(folder / "half.safetensors", components, every=2, dtype=torch.float16)
    catalog = LoraCatalog([folder, HERE])
    prompt = "<lora:mixed:0.7:-0.4> a <lora:half:0.5> <lora:lora_A:0.8:0.3> <lora:lora_D_c3lier:1> <lora:half:0.1>"
    session = LoraSession(components, catalog)
    before = different_layers(session, [model])
    report = session.set(prompt)
    merged = merge_loras(model, prompted_loras(prompt, catalog), tmp_path / "out.safetensors")
    assert before == [], "the live model and the file are the same to begin with"
    assert not report.refused
    assert merged.layers == report.layers_written > 600
    assert different_layers(session, [tmp_path / "out.safetensors"]) == []
    session.unload()


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_rows_of_open_clips_fused_weights_get_what_the_prompt_fuses(tmp_path, family, dtype):
    tiny = make_tiny(family, tmp_path / "config")
    names = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
    components = {names[name]: part.to(DTYPES[dtype]) for name, part in tiny.parts.items() if name in names}
    tiny.tensors.update({name: tensor.to(DTYPES[dtype]) for name, tensor in tiny.tensors.items()})
    model = tiny.write(tmp_path / "model.safetensors")
    lora = write_mixed_lora(tmp_path / "mixed.safetensors", components, every=5)
    session = LoraSession(components, LoraCatalog([tmp_path]))
    assert not session.set([("mixed", 0.8)]).refused
    merge(model, [f"{lora}:0.8"], tmp_path / "out.safetensors")
    ours, theirs = load_file(tmp_path / "out.safetensors"), load_file(model)
    fused = [name for name in theirs if name.endswith(("in_proj_weight", "in_proj_bias"))]
    changed = {sum(map(torch.equal, ours[name].chunk(3), theirs[name].chunk(3))) for name in fused}
    assert different_layers(session, [tmp_path / "out.safetensors"]) == []
    assert changed & {1, 2}, "of some weights a part of the rows stays as it is"
    session.unload()


def test_block_weights_and_ranks_act_as_in_a_prompt(tmp_path):
    unet, te = build()
    session = LoraSession({"unet": unet, "te1": te}, LoraCatalog([HERE]))
    session.set("<lora:lora_A:0.9:0.6:lbw=OUTD> <lora:lora_B:0.5:dyn=2>")
    files = [f"{HERE / 'lora_A.safetensors'}:0.9:0.6:lbw=OUTD", f"{HERE / 'lora_B.safetensors'}:0.5:dyn=2"]
    report = merge(BASE, files, tmp_path / "out.safetensors")
    assert [lora.weights != "" for lora in report.loras] == [True, False]
    assert different_layers(session, [tmp_path / "out.safetensors"]) == []
    session.unload()


def test_the_order_of_the_loras_changes_no_bit(tmp_path):
    files = [str(HERE / f"{name}.safetensors") for name in ("lora_A", "lora_B", "lora_D_c3lier")]
    for number, order in enumerate((files, files[::-1])):
        merge(BASE, order, tmp_path / f"{number}.safetensors")
    a, b = (load_file(tmp_path / f"{number}.safetensors") for number in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_wide_checkpoint_is_rounded_once_to_a_narrow_one(tmp_path, dtype):
    lora = str(HERE / "lora_E_c3lier.safetensors")
    merge(BASE, [lora], tmp_path / "wide.safetensors")
    merge(BASE, [lora], tmp_path / "narrow.safetensors", save_precision=dtype)
    wide, narrow = load_file(tmp_path / "wide.safetensors"), load_file(tmp_path / "narrow.safetensors")
    for name, tensor in narrow.items():
        assert tensor.dtype == (wide[name].dtype if "alphas" in name or "ids" in name else DTYPES[dtype]), name
        assert torch.equal(tensor, wide[name].to(tensor.dtype)), name


def test_presets_beside_a_lora_are_found(tmp_path):
    shutil.copy(HERE / "lora_A.safetensors", tmp_path / "a.safetensors")
    (tmp_path / "lbwpresets.txt").write_text("MINE:1,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0\n")
    report = merge(BASE, [f"{tmp_path / 'a.safetensors'}:1:lbw=MINE"], tmp_path / "out.safetensors")
    changed = {name for name, tensor in load_file(BASE).items() if not torch.equal(tensor, report_tensor(report, name))}
    assert len(changed) == report.layers == 18
    assert all(name.startswith("cond_stage_model.") for name in changed)


# The rest of the file


def test_what_no_lora_changes_is_the_same_byte_for_byte(tmp_path):
    merge(BASE, [f"{HERE / 'lora_A.safetensors'}:0.8"], tmp_path / "out.safetensors")
    before, after = load_file(BASE), load_file(tmp_path / "out.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert len(changed) == 210
    assert not [name for name in changed if name.startswith(PASSED_THROUGH)]
    assert all(name.endswith(".weight") for name in changed)


def test_a_strength_of_zero_gives_the_same_tensors_and_says_so(tmp_path):
    report = merge(BASE, [f"{HERE / 'lora_A.safetensors'}:0"], tmp_path / "out.safetensors")
    assert data_sha256(tmp_path / "out.safetensors") == data_sha256(BASE)
    assert report.notes == ("no layer changes: every strength is 0",)


def test_the_sources_metadata_is_kept_without_hashes_of_other_tensors(tmp_path):
    source = {
        "modelspec.author": "somebody",
        "modelspec.title": "Source",
        "modelspec.hash_sha256": "0x12",
        "sshs_model_hash": "34",
        "ss_x": "y",
    }
    model = write_as(BASE, tmp_path / "model.safetensors", torch.float16, source)
    merge(model, [str(HERE / "lora_A.safetensors")], tmp_path / "new name.safetensors")
    found = metadata_of(tmp_path / "new name.safetensors")
    assert (found["modelspec.author"], found["ss_x"], found["format"]) == ("somebody", "y", "pt")
    assert found["modelspec.title"] == "new name"
    assert found["modelspec.merged_from"] == "Source, lora_A.safetensors"
    assert not {"modelspec.hash_sha256", "sshs_model_hash", "modelspec.prediction_type"} & found.keys()


def test_the_recipe_names_files_hashes_and_strengths(tmp_path):
    lora = HERE / "lora_A.safetensors"
    merge(BASE, [f"{lora}:0.8:0.5:lbw=MIDD"], tmp_path / "out.safetensors", hashed=True, precision="bf16")
    recipe = json.loads(metadata_of(tmp_path / "out.safetensors")["prefuse.recipe"])
    (made,) = recipe["loras"]
    assert recipe["model"]["file"] == "base.safetensors"
    assert len(recipe["model"]["sha256"]["base.safetensors"]) == 64
    assert (made["file"], made["te"], made["unet"]) == ("lora_A.safetensors", 0.8, 0.5)
    assert made["sha256"] == metadata_of(lora)["sshs_model_hash"] == data_sha256(lora)
    assert made["weights"] == "lbw=1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0"
    assert made["tag"] == "<lora:lora_A:0.8:0.5:lbw=MIDD>"
    assert (recipe["precision"], recipe["save_precision"]) == ("bf16", "as in the model")


def test_a_merge_of_a_merge_tells_both_recipes(tmp_path):
    for number, (model, lora) in enumerate([(BASE, "lora_A"), (tmp_path / "0.safetensors", "lora_B")]):
        merge(model, [f"{HERE / lora}.safetensors"], tmp_path / f"{number}.safetensors")
    recipe = json.loads(metadata_of(tmp_path / "1.safetensors")["prefuse.recipe"])
    assert [lora["file"] for lora in recipe["loras"]] == ["lora_B.safetensors"]
    assert [lora["file"] for lora in recipe["model"]["recipe"]["loras"]] == ["lora_A.safetensors"]


def test_of_sd2_nothing_is_claimed_that_the_file_does_not_tell(tmp_path):
    tiny = make_tiny("sd2", tmp_path / "config")
    lora = write_mixed_lora(tmp_path / "a.safetensors", {"unet": tiny.parts["unet"]}, every=9)
    for number, metadata in enumerate(({}, {"modelspec.prediction_type": "epsilon"})):
        model = tiny.write(tmp_path / f"model{number}.safetensors", metadata)
        merge(model, [str(lora)], tmp_path / f"out{number}.safetensors")
    silent, told = (metadata_of(tmp_path / f"out{number}.safetensors") for number in range(2))
    assert not {"modelspec.architecture", "modelspec.resolution", "modelspec.prediction_type"} & silent.keys()
    assert told["modelspec.prediction_type"] == "epsilon"


# Other kinds of models


def test_a_ckpt_gives_what_its_tensors_as_safetensors_give(tmp_path):
    tensors = load_file(BASE)
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 5}, tmp_path / "model.ckpt")
    lora = str(HERE / "lora_D_c3lier.safetensors")
    merge(tmp_path / "model.ckpt", [lora], tmp_path / "a.safetensors")
    merge(BASE, [lora], tmp_path / "b.safetensors")
    assert data_sha256(tmp_path / "a.safetensors") == data_sha256(tmp_path / "b.safetensors")
    assert metadata_of(tmp_path / "a.safetensors")["modelspec.merged_from"].startswith("model.ckpt, ")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "model.ckpt"]


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("diffusers")
    tiny = make_tiny("sd1", root / "config")
    return tiny, write_folder(tiny, root / "model")


def relative_files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_diffusers_folder_becomes_another_one_that_diffusers_loads(tmp_path, diffusers_folder):
    from diffusers import StableDiffusionPipeline

    tiny, model = diffusers_folder
    components = {"unet": tiny.parts["unet"], "te1": tiny.parts["text_encoder"]}
    lora = write_mixed_lora(tmp_path / "mixed.safetensors", components)
    embeddings = sum("embeddings" in layer.key for layer in KeyMap.from_modules(components).parameters)
    before = relative_files(model)
    report = merge(model, [f"{lora}:0.6"], tmp_path / "merged")
    after = relative_files(tmp_path / "merged")
    different = {name for name in before if before[name] != after[name]}
    session = LoraSession(components, LoraCatalog([tmp_path]))
    assert not session.set([("mixed", 0.6)]).refused
    try:
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None)
        loaded = LoraSession({"unet": pipe.unet, "te1": pipe.text_encoder}, LoraCatalog([tmp_path]))
        live = {layer.key: layer.live() for layer in loaded.keymap.parameters}
        assert all(torch.equal(live[layer.key], layer.live()) for layer in session.keymap.parameters)
    finally:
        session.unload()
    assert before.keys() == after.keys()
    assert {name.partition("/")[0] for name in different} == {"unet", "text_encoder"}
    assert report.layers == len(session.keymap.parameters) - embeddings
    assert relative_files(model) == before


def test_a_folder_saved_in_fp16_has_all_its_weights_in_fp16(tmp_path, diffusers_folder):
    tiny, model = diffusers_folder
    lora = write_mixed_lora(tmp_path / "a.safetensors", {"unet": tiny.parts["unet"]}, every=9)
    merge(model, [str(lora)], tmp_path / "merged", save_precision="fp16")
    files = list((tmp_path / "merged").glob("*/*.safetensors"))
    dtypes = {tensor.dtype for file in files for tensor in load_file(file).values() if tensor.is_floating_point()}
    assert len(files) == 3
    assert dtypes == {torch.float16}


def test_weights_of_a_folder_that_would_not_be_merged_are_left_out_and_named(tmp_path, diffusers_folder):
    tiny, original = diffusers_folder
    model = tmp_path / "model"
    shutil.copytree(original, model)
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    (model / "v1-5.safetensors").write_bytes(b"old")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (model / ".git" / "lfs").mkdir(parents=True)
    (model / ".git" / "lfs" / "object").write_bytes(b"old")
    lora = write_mixed_lora(tmp_path / "a.safetensors", {"unet": tiny.parts["unet"]}, every=9)
    report = merge(model, [str(lora)], tmp_path / "merged")
    assert relative_files(tmp_path / "merged").keys() == relative_files(original).keys()
    left = "diffusion_pytorch_model.bin, diffusion_pytorch_model.fp16.safetensors, v1-5.safetensors"
    assert left in " ".join(report.notes)


# The command


def test_the_command_merges_a_prompt_and_tells_it_as_json(tmp_path, capsys):
    command = ["merge", "--model", str(BASE), "--prompt", "a cat <lora:lora_A:0.8> <lora:lora_B:0.5>"]
    command += ["--lora-dir", str(HERE), "--out", str(tmp_path / "out.safetensors"), "--json"]
    assert main([*command, "--dry-run"]) == 0
    preview = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert [preview.pop("written"), report.pop("written")] == [False, True]
    assert [preview.pop("seconds") > 0, report.pop("seconds") > 0] == [True, True]
    dates = [told["metadata"].pop("modelspec.date") for told in (preview, report)]
    assert [preview["disk"].pop("free") > 0, report["disk"].pop("free") > 0, *map(bool, dates)] == [True] * 4
    assert preview == report
    assert report["size"] == (tmp_path / "out.safetensors").stat().st_size
    assert [lora["name"] for lora in report["loras"]] == ["lora_A", "lora_B"]
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_a_file_name_may_hold_colons(tmp_path):
    odd = tmp_path / "a:0.5:b.safetensors"
    odd.write_bytes((HERE / "lora_A.safetensors").read_bytes())
    ((request, entry),) = given_files([f"{odd}:0.8:0.4"])
    assert (entry.path, request.te, request.unet) == (odd, 0.8, 0.4)


def test_progress_ends_with_all_the_bytes(tmp_path):
    seen = []
    merge(BASE, [str(HERE / "lora_A.safetensors")], tmp_path / "a.safetensors", progress=lambda *n: seen.append(n))
    assert seen[-1][0] == seen[-1][1] > (tmp_path / "a.safetensors").stat().st_size
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 988  # after each tensor
