"""A DyLoRA as one file for each rank, beside slices made by hand."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from lib_lora.__main__ import main
from lib_lora.core.files import read_lora_file
from lib_lora.core.network import load_network
from lib_lora.core.saving import save_tensors
from lib_lora.errors import JobError, NonFiniteError, OutputError
from lib_lora.tools.dylora import SCALE, split_dylora
from tests.family_files import family_tensors, write

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {"linear": (24, 16), "1x1": (16, 24, 1, 1), "3x3": (24, 8, 3, 3), "rows": (16, 16)}
SAID = {"ss_training_comment": "by hand", "ss_network_dim": "12", "ss_network_alpha": "6.0", "ss_output_name": "old"}
HASHES = ("sshs_model_hash", "sshs_legacy_hash")


def dylora(path: Path, rank: int = 12, dtype=torch.float32, metadata=SAID) -> Path:
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for kind, (out, *rest) in SHAPES.items():
        up, down = torch.randn(out, rank, *(1,) * len(rest[1:]), generator=generator), torch.randn(rank, *rest)
        layers[kind] = {"lora_up.weight": up.to(dtype), "lora_down.weight": down.to(dtype), "alpha": torch.tensor(6.0)}
    return write(path, layers, metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_file_holds_the_first_ranks_bit_for_bit(tmp_path, dtype):
    source = dylora(tmp_path / "a.safetensors", dtype=dtype)
    split = split_dylora(source, tmp_path / "b.safetensors", 4)
    assert split.paths == (tmp_path / "b-0004.safetensors", tmp_path / "b-0008.safetensors")
    whole = load_file(source)
    for path, rank in zip(split.paths, (4, 8), strict=True):
        part = load_file(path)
        assert part.keys() == whole.keys()
        for key, tensor in whole.items():
            cut = tensor[:, :rank] if "lora_up" in key else tensor[:rank] if "lora_down" in key else tensor
            assert torch.equal(part[key], cut), key
            assert part[key].dtype == tensor.dtype


def test_metadata_are_kohyas_and_hashes_are_of_the_file_itself(tmp_path):
    source = dylora(tmp_path / "a.safetensors", metadata=SAID | dict.fromkeys(HASHES, "stale"))
    for path, rank in zip(split_dylora(source, tmp_path / "b.safetensors", 4).paths, (4, 8), strict=True):
        said = dict(read_lora_file(path).metadata)
        data = path.read_bytes()
        assert said.pop("sshs_model_hash") == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        assert said.pop("sshs_legacy_hash") == hashlib.sha256(b"").hexdigest()[:8]  # of a file below 1 MiB
        comment = f"split from DyLoRA, rank 12 to {rank}; by hand"
        assert said == SAID | {"ss_training_comment": comment, "ss_network_dim": str(rank)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ranks_that_are_meant_at_the_scale_of_the_whole_keep_it(tmp_path, dtype):
    source = dylora(tmp_path / "a.safetensors", dtype=dtype, metadata=SAID | SCALE)
    for path, rank in zip(split_dylora(source, tmp_path / "b.safetensors", 4).paths, (4, 8), strict=True):
        cut, whole = load_network(path), load_network(source).with_rank(rank)
        for name, adapter in cut.adapters.items():
            own, theirs = adapter.factors(), whole.adapters[name].factors()
            assert torch.equal(own.up, theirs.up)
            assert torch.equal(own.down, theirs.down)
            assert own.scale == theirs.scale == 0.5
        assert cut.metadata["ss_network_alpha"] == str(6.0 * rank / 12)
        again = split_dylora(path, tmp_path / "c.safetensors", rank // 2).paths[0]
        assert {adapter.factors().scale for adapter in load_network(again).adapters.values()} == {0.5}
        again.unlink()


def test_a_file_without_metadata_is_split_too(tmp_path):
    source = dylora(tmp_path / "a.safetensors", metadata={})
    (path,) = split_dylora(source, tmp_path / "b.safetensors", 6).paths
    assert read_lora_file(path).metadata["ss_network_dim"] == "6"


@pytest.mark.parametrize("unit", [0, -4, 5, 12, 13])
def test_a_unit_that_makes_no_parts_is_refused(tmp_path, unit):
    source = dylora(tmp_path / "a.safetensors")
    with pytest.raises(JobError, match=f"rank 12, which has no parts of {unit}; units are 1, 2, 3, 4, 6"):
        split_dylora(source, tmp_path / "b.safetensors", unit)
    assert list(tmp_path.iterdir()) == [source]


def test_what_is_no_dylora_is_refused(tmp_path):
    mixed = write(
        tmp_path / "mixed.safetensors",
        {
            kind: {"lora_up.weight": torch.ones(24, rank), "lora_down.weight": torch.ones(rank, 8)}
            for kind, rank in (("linear", 4), ("rows", 8))
        },
    )
    other = write(tmp_path / "other.safetensors", {"linear": family_tensors("LoHa", (24, 16))})
    core = write(tmp_path / "core.safetensors", {"3x3": family_tensors("LoRA Tucker", SHAPES["3x3"])})
    nothing = tmp_path / "nothing.safetensors"
    save_tensors(nothing, {"a": torch.ones(2)})
    for source, words in ((mixed, "the ranks 4, 8"), (other, "hada_w1_a"), (core, "lora_mid"), (nothing, "no layers")):
        with pytest.raises(JobError, match=f"{source.name} is no DyLoRA: .*{words}"):
            split_dylora(source, tmp_path / "b.safetensors", 2)
    assert not list(tmp_path.glob("b-*"))


def test_nan_is_refused(tmp_path):
    source = write(
        tmp_path / "a.safetensors",
        {"linear": {"lora_up.weight": torch.full((8, 4), torch.nan), "lora_down.weight": torch.ones(4, 8)}},
    )
    with pytest.raises(NonFiniteError):
        split_dylora(source, tmp_path / "b.safetensors", 2)


def test_one_older_file_refuses_all_before_any_is_written(tmp_path):
    source = dylora(tmp_path / "a.safetensors")
    older = tmp_path / "b-0008.safetensors"
    older.write_bytes(b"older")
    with pytest.raises(OutputError):
        split_dylora(source, tmp_path / "b.safetensors", 4)
    assert sorted(tmp_path.iterdir()) == [source, older]
    assert older.read_bytes() == b"older"
    split_dylora(source, tmp_path / "b.safetensors", 4, overwrite=True)
    assert load_file(older)


def test_a_cancelled_job_takes_back_what_it_added(tmp_path):
    source = dylora(tmp_path / "a.safetensors")

    def cancel(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split_dylora(source, tmp_path / "b.safetensors", 2, progress=cancel)
    assert list(tmp_path.iterdir()) == [source]


def test_the_command_names_the_files(tmp_path, capsys):
    source = dylora(tmp_path / "a.safetensors")
    options = ["split-dylora", "--lora", str(source), "--out", str(tmp_path / "b.safetensors")]
    assert main([*options, "--unit", "6", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["paths"], told["ranks"], told["rank"]) == ([str(tmp_path / "b-0006.safetensors")], [6], 12)
    assert main([*options, "--unit", "6"]) == 1
    assert "b-0006.safetensors exists already" in capsys.readouterr().err
    assert main([*options, "--unit", "7"]) == 1
    assert "units are" in capsys.readouterr().err
