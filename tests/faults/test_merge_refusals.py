"""Merging what does not fit, or on a disk that fails: one sentence, and the folder is as it was."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_lora.__main__ import main
from tests.merge_models import BASE, GOLDEN, LORA, diffusers_folder, output_beside_another, snapshot

TO_K = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
KOHYA_TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_1"
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files, limits or signals")


@pytest.fixture
def out(tmp_path) -> Path:
    return output_beside_another(tmp_path)


def sd1(folder: Path, value: float = 1.0) -> Path:
    """The least that is known for SD 1.x: a transformer whose layer of 768 columns reads the text."""
    paths = (
        "input_blocks.0.0",
        "input_blocks.1.0.in_layers.2",
        "input_blocks.1.1.proj_in",
        "output_blocks.0.0.x",
        TO_K,
    )
    names = [f"model.diffusion_model.{path}.weight" for path in paths]
    tensors = {name: torch.full((320, 768), value).half() for name in names}
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def lora(folder: Path, name: str = KOHYA_TO_K, rows: int = 320, columns: int = 768, value: float = 0.01, rank: int = 1):
    tensors = {"lora_up.weight": torch.full((rows, rank), value), "lora_down.weight": torch.ones(rank, columns)}
    save_file({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def pickled_folder(folder: Path) -> Path:
    for part in ("unet", "text_encoder"):
        (folder / "model" / part).mkdir(parents=True)
    shutil.copy(BASE, folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "model" / "text_encoder" / "pytorch_model.bin").write_bytes(b"weights")
    return folder / "model"


MODELS = {
    "missing": (lambda f: f / "none.safetensors", "no .safetensors checkpoint and no diffusers folder"),
    "an empty folder": (lambda f: f, "no .safetensors checkpoint and no diffusers folder"),
    "a LoRA": (lambda f: LORA, "lora_A.safetensors is no checkpoint"),
    "a web page": (lambda f: written(f / "a.safetensors", b"<html>" * 9), "web page"),
    "cut off": (lambda f: written(f / "a.safetensors", BASE.read_bytes()[:-7]), "incomplete"),
    "a bad pickle": (lambda f: written(f / "a.ckpt", b"\x80\x02cos\nsystem\n."), "refused"),
    "a folder of pickles": (pickled_folder, "model/text_encoder has no .safetensors weights"),
    "NaN": (lambda f: sd1(f, float("nan")), "to_k.weight holds NaN or infinity"),
}
LORAS = {
    "missing": (lambda f: "none.safetensors:0.8", "there is no LoRA file 'none.safetensors:0.8'"),
    "a checkpoint": (lambda f: BASE, "none of its"),
    "a web page": (lambda f: written(f / "a.safetensors", b"<html>" * 9), "web page"),
    "another family": (
        lambda f: lora(f, "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"),
        "made for SDXL",
    ),
    "no layer of the model": (lambda f: lora(f, "lora_unet_somewhere_else"), "none of its 1 layers exists"),
    "another shape": (lambda f: lora(f, columns=640), r"\(320, 768\) here, \(320, 640\) in the LoRA"),
    "rank 0": (lambda f: lora(f, rank=0), "none of its 0 layers exists"),
    "NaN": (lambda f: lora(f, value=float("nan")), "1 of 1 layers hold NaN or infinity"),
    "infinity": (lambda f: lora(f, value=float("inf")), "1 of 1 layers hold NaN or infinity"),
    "too strong for fp16": (lambda f: lora(f, value=70_000.0), "attn2.to_k would overflow torch.float16"),
    "no number": (lambda f: f"{lora(f)}:much", "te is 'much', not a number"),
    "a huge number": (lambda f: f"{lora(f)}:1e999", "beyond the limits"),
    "an unknown preset": (lambda f: f"{lora(f)}:1:lbw=NOSUCH", "NOSUCH"),
}


def refusal(capsys, model: Path, given: object, out: Path, *options: str) -> str:
    """The sentence of a merge that is refused."""
    code = main(["merge", "--model", str(model), "--lora", str(given), "--out", str(out), *options])
    told = capsys.readouterr()
    assert (code, told.out) == (1, "")
    assert len(told.err.splitlines()) == 1
    return told.err


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_is_none_is_refused(tmp_path, out, capsys, kind):
    make, message = MODELS[kind]
    given = lora(tmp_path) if kind == "NaN" else LORA
    before, model = snapshot(out.parent), make(tmp_path / "out" if kind == "an empty folder" else tmp_path)
    target = out.parent / "folder" if model.is_dir() else out
    assert message in refusal(capsys, model, given, target)
    assert snapshot(out.parent) == before


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_that_does_not_fit_is_refused(tmp_path, out, capsys, kind):
    make, message = LORAS[kind]
    before = snapshot(out.parent)
    assert re.search(message, refusal(capsys, sd1(tmp_path), make(tmp_path), out))
    assert snapshot(out.parent) == before


def test_one_bad_lora_of_two_is_the_end_of_both(tmp_path, out, capsys):
    model, good = sd1(tmp_path), lora(tmp_path)
    message = refusal(capsys, model, good, out, "--lora", str(LORA))
    assert message.startswith("lora_A: 2 of 2 layers have another shape")
    assert list(out.parent.iterdir()) == [out.parent / "precious.txt"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat", "names no LoRA"),
        ("<lora:nobody:1>", "no LoRA of the"),
        ("<lora:lora_A:1> <lora:lora_B:x>", "not a number"),
    ],
)
def test_a_prompt_that_can_not_be_merged_is_refused(out, capsys, prompt, message):
    command = ["merge", "--model", str(BASE), "--prompt", prompt, "--lora-dir", str(GOLDEN), "--out", str(out)]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


# Where nothing can be written


def linked(path: Path) -> Path:
    path.symlink_to(path.with_name("precious.txt"))
    return path


def folder_at(path: Path) -> Path:
    path.mkdir()
    return path


OUTPUTS = {
    "a link": (lambda f: linked(f / "a.safetensors"), "choose another name"),
    "a folder": (lambda f: folder_at(f / "a.safetensors"), "choose another name"),
    "in no folder": (lambda f: f / "none" / "a.safetensors", "the folder none can not be written to"),
    "in a system's folder": (lambda _: Path("/proc/a.safetensors"), "the folder proc can not be written to"),
    "of another kind": (lambda f: f / "a.ckpt", "is a .safetensors file"),
    "the model": (lambda f: f / "model.safetensors", "is what is merged itself"),
}


@posix_only
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_that_can_not_be_is_told_before_the_work(out, capsys, monkeypatch, kind, force):
    make, message = OUTPUTS[kind]
    model = Path(shutil.copy(BASE, out.with_name("model.safetensors")))
    target = make(out.parent)
    monkeypatch.setattr("lib_lora.tools.merge.Resolver", None)  # nothing is read of the LoRA
    before = snapshot(out.parent)
    assert message in refusal(capsys, model, LORA, target, *(["--force"] if force else []))
    assert snapshot(out.parent) == before


def test_a_lora_is_not_replaced_by_what_it_is_merged_into(out, capsys):
    own = Path(shutil.copy(LORA, out))
    assert "is what is merged itself" in refusal(capsys, BASE, own, out, "--force")
    assert out.read_bytes() == LORA.read_bytes()


@posix_only
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="the superuser writes everywhere")
def test_a_folder_without_permission_is_told_before_the_work(out, capsys):
    out.parent.chmod(0o555)
    assert "the folder out can not be written to" in refusal(capsys, BASE, LORA, out)


def test_an_older_file_is_replaced_only_if_asked_for(out, capsys):
    out.write_bytes(b"older")
    assert "exists already" in refusal(capsys, BASE, LORA, out)
    assert out.read_bytes() == b"older"
    assert main(["merge", "--model", str(BASE), "--lora", str(LORA), "--out", str(out), "--force"]) == 0
    assert load_file(out).keys() == load_file(BASE).keys()


def test_an_older_folder_is_never_replaced(tmp_path, out, capsys):
    before = snapshot(out.parent)
    message = refusal(capsys, diffusers_folder(tmp_path), LORA, out.parent, "--force")
    assert "choose another name" in message
    assert snapshot(out.parent) == before


def test_a_full_disk_is_told_before_the_work(out, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    assert "needs 2.1 MB and the disk has 2.0 MB" in refusal(capsys, BASE, LORA, out)
    assert not out.exists()


def test_a_device_that_is_not_there_is_refused(out, capsys):
    assert "device" in refusal(capsys, BASE, LORA, out, "--device", "nonsense")
