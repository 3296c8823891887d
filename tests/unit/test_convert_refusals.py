"""`convert --lora`: what it refuses, and that nothing is written then."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
import torch

from lib_lora.__main__ import main
from lib_lora.core.files import read_lora_file
from lib_lora.core.models import BaseModel
from lib_lora.core.saving import save_tensors
from lib_lora.errors import AdapterError, FileError, JobError, NamingError, NonFiniteError, OutputError
from lib_lora.tools.convert import ALPHA_KINDS, convert_lora

if TYPE_CHECKING:
    from pathlib import Path

REFUSED, USAGE = 1, 2
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT_LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
OTHER = LAYER.replace("to_k", "to_v")
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows lets users make no links")


def lora(layer: str = LAYER, rank: int = 4) -> dict[str, torch.Tensor]:
    """One layer of SD1: 768 numbers of text come in."""
    made = {f"{layer}.lora_down.weight": torch.randn(rank, 768), f"{layer}.lora_up.weight": torch.randn(8, rank)}
    return made | {f"{layer}.alpha": torch.tensor(2.0)}


@pytest.fixture
def file(tmp_path) -> Path:
    save_tensors(tmp_path / "ink.safetensors", lora(), {"author": "me"})
    return tmp_path / "ink.safetensors"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(item.relative_to(folder)): item.read_bytes() if item.is_file() else None for item in folder.rglob("*")}


def peft_tensors(layer: str = PEFT_LAYER) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.randn(4, 768), f"{layer}.lora_B.weight": torch.randn(8, 4)}


CONTENTS = {
    "already kohya's": (lora(), "kohya", JobError, "is in kohya's layout already"),
    "already PEFT's": (peft_tensors(), "peft", JobError, "is in peft's layout already"),
    "LoHa": (
        {
            f"{OTHER}.hada_{w}": torch.randn(*s)
            for w, s in {"w1_a": (8, 2), "w1_b": (2, 768), "w2_a": (8, 2), "w2_b": (2, 768)}.items()
        },
        "peft",
        JobError,
        r"attn2_to_v\.hada_w1_a is LoHa; files in peft's layout hold plain LoRA layers alone",
    ),
    "DoRA": (lora() | {f"{LAYER}.dora_scale": torch.ones(8, 1)}, "peft", JobError, "dora_scale is DoRA of LoRA"),
    "Tucker": (
        {f"{LAYER}.lora_down.weight": torch.randn(2, 8, 1, 1), f"{LAYER}.lora_up.weight": torch.randn(8, 2, 1, 1)}
        | {f"{LAYER}.lora_mid.weight": torch.randn(2, 2, 3, 3)},
        "peft",
        JobError,
        "lora_mid.weight is LoRA",
    ),
    "PEFT's bias": (
        peft_tensors() | {f"{PEFT_LAYER}.lora_B.bias": torch.randn(8)},
        "kohya",
        JobError,
        r"lora_B\.bias is LoRA; files in kohya's layout",
    ),
    "embedding": (
        lora() | {"bundle_emb.me.clip_l": torch.ones(1, 8)},
        "peft",
        JobError,
        "bundle_emb.me.clip_l is no part",
    ),
    "other tensor": (lora() | {"banana": torch.ones(1)}, "peft", JobError, "banana is no part of a LoRA"),
    "rank 0": (lora(OTHER, 0) | lora(), "peft", JobError, "rank 0"),
    "nothing": ({}, "peft", JobError, "it has no layers"),
    "NaN": (lora() | {f"{LAYER}.lora_up.weight": torch.full((8, 4), torch.nan)}, "peft", NonFiniteError, "NaN"),
    "half a layer": ({f"{LAYER}.lora_up.weight": torch.ones(8, 4)}, "peft", AdapterError, "no known algorithm"),
    "unknown layer": (lora(LAYER.replace("attn2", "attn9")) | lora(), "peft", NamingError, "has no layer named"),
    "two spellings": (
        lora() | lora("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"),
        "peft",
        JobError,
        "names a layer in two spellings",
    ),
    "Flux": (
        {
            f"lora_unet_double_blocks_0_img_attn_proj.lora_{k}.weight": torch.ones(s)
            for k, s in {"up": (8, 4), "down": (4, 8)}.items()
        },
        "peft",
        NamingError,
        "this is for Flux",
    ),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=list(CONTENTS))
def test_what_the_other_layout_can_not_hold_is_refused_with_the_first_layer(tmp_path, content):
    tensors, to, fault, sentence = content
    save_tensors(tmp_path / "x.safetensors", tensors)
    before = snapshot(tmp_path)
    with pytest.raises(fault, match=sentence):
        convert_lora(tmp_path / "x.safetensors", to, tmp_path / "new.safetensors")
    assert snapshot(tmp_path) == before


def test_a_family_that_the_file_does_not_tell_must_be_given(tmp_path):
    source = tmp_path / "x.safetensors"
    save_tensors(source, lora("lora_unet_mid_block_attentions_0_proj_in"))
    with pytest.raises(NamingError, match="this is for an unknown model"):
        convert_lora(source, "peft", tmp_path / "new.safetensors")
    made = convert_lora(source, "peft", tmp_path / "new.safetensors", family=BaseModel.SDXL)
    assert (made.base_model, made.layers, made.layout) == ("SDXL", 1, "peft")


@posix_only
@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_no_file_is_replaced_and_no_link_is_followed(file, tmp_path, kind):
    out, victim = tmp_path / "out.safetensors", tmp_path / "victim"
    victim.write_bytes(b"precious")
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_bytes(b"old")
    else:
        out.symlink_to(victim if kind == "link" else tmp_path / "nothing")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError):
        convert_lora(file, "peft", out, overwrite=kind != "file")
    assert snapshot(tmp_path) == before


def test_texts_and_settings_that_somebody_broke_are_not_trusted(file, tmp_path):
    kinds = (5, ["X9"], ["F32", *[1] * 99], {"a": []}, "F32")
    texts = ("[]", "{", "[" * 2000, *(json.dumps({PEFT_LAYER: kind}) for kind in kinds))
    for number, text in enumerate(texts):
        broken = tmp_path / f"{number}.safetensors"
        save_tensors(broken, peft_tensors(), {ALPHA_KINDS: text, "lora_adapter_metadata": text})
        convert_lora(broken, "kohya", tmp_path / f"{number}k.safetensors")
        alpha = read_lora_file(tmp_path / f"{number}k.safetensors").tensors[f"{LAYER}.alpha"]
        assert (alpha.item(), alpha.dtype, alpha.ndim < 2) == (4.0, torch.float32, True)


@pytest.fixture
def command(capsys):
    def run(*arguments: object):
        code = main(["convert", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_command_converts_and_says_what_it_made(command, file, tmp_path):
    out = tmp_path / "new.safetensors"
    code, stdout, stderr = command("--lora", file, "--to", "peft", "--out", out, "--json")
    expected = {"source": str(file), "path": str(out), "layout": "peft", "base_model": "SD 1.x", "layers": 1}
    assert (code, json.loads(stdout).items() >= expected.items(), stderr) == (0, True, "")
    assert command("--lora", file, "--to", "peft", "--out", out)[0] == REFUSED
    code, stdout, _ = command("--lora", file, "--to", "peft", "--out", out, "--force", "--family", "sd1")
    assert code == 0
    assert stdout.startswith(f"{out}: 1 layers for SD 1.x in peft's layout, ")
    assert read_lora_file(out).metadata["author"] == "me"


def test_a_refusal_is_one_sentence(command, tmp_path):
    code, stdout, stderr = command("--lora", tmp_path / "no", "--to", "peft", "--out", tmp_path / "x.safetensors")
    assert (code, stdout, stderr.count("\n")) == (REFUSED, "", 1)
    with pytest.raises(FileError):
        convert_lora(tmp_path / "no", "peft", tmp_path / "x.safetensors")
