"""Other ranks for LoRA files, beside the truncation of whole matrices in float64."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_lora.__main__ import main
from lib_lora.core.network import load_network
from lib_lora.errors import AdapterError, JobError, NonFiniteError, OutputError, PrefuseError
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.resize import resize
from tests.family_files import FAMILIES, NAMES, family_tensors, write

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {"linear": (24, 16), "1x1": (16, 24, 1, 1), "3x3": (24, 8, 3, 3), "rows": (16, 16)}
DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Of a file → what its rounding costs at most, relative to the layer's norm."""
REPORTED = 0.02
"""Of a reported error: rounding is not quite orthogonal to what was cut off."""


def lora(rank: int = 8, alpha: float | None = 3.0, dtype=torch.float32, size: float = 0.3, **more):
    """One LoRA on a layer of every kind."""
    layers = {}
    for seed, (kind, (out, *rest)) in enumerate(SHAPES.items()):
        noise = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ones = (1,) * len(rest[1:])
        layers[kind] = {
            "lora_up.weight": noise(out, rank, *ones).mul(size).to(dtype),
            "lora_down.weight": noise(rank, *rest).mul(size).to(dtype),
        }
        if alpha is not None:
            layers[kind]["alpha"] = torch.tensor(alpha).to(dtype)
        layers[kind] |= more
    return layers


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Layer → ΔW in float64."""
    found = {}
    for name, adapter in load_network(path).adapters.items():
        low = adapter.factors()
        found[name] = low.scale * low.up.double() @ low.down.double()
    return found


def best(matrix: torch.Tensor, rank: int) -> float:
    """The error of the best approximation."""
    return torch.linalg.svdvals(matrix)[rank:].norm().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [None, 3.0, 0.7, -2.0, 0.0])
def test_every_layer_is_the_best_of_its_rank_and_its_error_is_told(tmp_path, dtype, alpha):
    source = write(tmp_path / "a.safetensors", lora(alpha=alpha, dtype=dtype))
    outcome = resize(source, tmp_path / "b.safetensors", RankRule(3, 2))
    exact, made = deltas(source), deltas(tmp_path / "b.safetensors")
    for layer in outcome.layers:
        whole, error = exact[layer.name], (made[layer.name] - exact[layer.name]).norm().item()
        assert layer.rank == (2 if "conv3" in layer.name else 3)
        assert error <= best(whole, layer.rank) + DTYPES[dtype] * whole.norm().item()
        assert layer.error == pytest.approx(error, rel=REPORTED, abs=1e-12)
        assert layer.norm == pytest.approx(whole.norm().item(), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_rank_in_another_type_is_the_same_but_for_rounding(tmp_path, dtype):
    source = write(tmp_path / "a.safetensors", lora(alpha=0.7, dtype=torch.float64))
    outcome = resize(source, tmp_path / "b.safetensors", RankRule(8), dtype=dtype)
    exact, made = deltas(source), deltas(tmp_path / "b.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {dtype}
    for layer in outcome.layers:
        error = (made[layer.name] - exact[layer.name]).norm().item()
        assert 0 < error <= DTYPES[dtype] * exact[layer.name].norm().item()
        assert layer.error == pytest.approx(error, rel=1e-3)


def test_layers_that_are_small_enough_are_kept_bit_for_bit(tmp_path):
    source = write(tmp_path / "a.safetensors", lora(dtype=torch.float16))
    outcome = resize(source, tmp_path / "b.safetensors", RankRule(8, 2))
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) == ("conv3" not in key), key
    assert {layer.error == 0 for layer in outcome.layers if "conv3" not in layer.name} == {True}


def test_a_rank_beyond_the_layers_sides_becomes_their_smaller_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(320, 4096, generator=generator), torch.randn(4096, 320, generator=generator)
    source = write(tmp_path / "a.safetensors", {"rows": {"lora_up.weight": up, "lora_down.weight": down}})
    outcome = resize(source, tmp_path / "b.safetensors", RankRule(512))
    (exact,), (made,) = deltas(source).values(), deltas(tmp_path / "b.safetensors").values()
    assert outcome.layers[0].rank == 320
    assert (made - exact).norm() < 1e-5 * exact.norm()


def test_alpha_keeps_its_part_of_the_rank(tmp_path):
    source = write(tmp_path / "a.safetensors", lora(rank=8, alpha=4.0, dtype=torch.float16))
    resize(source, tmp_path / "b.safetensors", RankRule(2))
    tensors = load_file(tmp_path / "b.safetensors")
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {1.0}


def test_very_small_layers_do_not_underflow_in_fp16(tmp_path):
    layers = lora(size=1e-3)
    for parts in layers.values():
        parts["lora_up.weight"] *= 1e-3
        parts["lora_down.weight"] *= 1e2
    source = write(tmp_path / "a.safetensors", layers)
    outcome = resize(source, tmp_path / "b.safetensors", RankRule(8), dtype=torch.float16)
    assert outcome.error < DTYPES[torch.float16]


def test_numbers_beyond_fp16_are_refused_with_a_way_out(tmp_path):
    source = write(tmp_path / "a.safetensors", lora(size=1e5))
    with pytest.raises(NonFiniteError, match="beyond float16; save it with --save-precision"):
        resize(source, tmp_path / "b.safetensors", RankRule(4), dtype=torch.float16)
    assert sorted(tmp_path.iterdir()) == [source]


def peft_file(path: Path, metadata: dict[str, str]) -> Path:
    generator = torch.Generator().manual_seed(0)
    layer = "unet.mid_block.attentions.0.proj_in"
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(8, 16, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(24, 8, generator=generator),
        f"{layer}.lora_B.bias": torch.randn(24, generator=generator),
    }
    save_file(tensors, path, metadata=metadata)
    return path


def test_a_file_of_peft_stays_one_and_its_settings_are_folded_in(tmp_path):
    settings = {"lora_adapter_metadata": json.dumps({"unet.r": 8, "unet.lora_alpha": 4})}
    source = peft_file(tmp_path / "a.safetensors", settings)
    resize(source, tmp_path / "b.safetensors", RankRule(3))
    before, after = load_network(source).adapters, load_network(tmp_path / "b.safetensors").adapters
    assert load_file(source).keys() == load_file(tmp_path / "b.safetensors").keys()
    (weight, bias) = before
    exact = before[weight].delta_weight(torch.empty(24, 16)).double()
    made = after[weight].delta_weight(torch.empty(24, 16)).double()
    assert (made - exact).norm() <= best(exact, 3) + 1e-5
    assert torch.equal(before[bias].delta_weight(torch.empty(24)), after[bias].delta_weight(torch.empty(24)))


def test_diffusers_is_told_ranks_that_differ_and_that_each_is_its_alpha(tmp_path):
    """It takes one alpha for all layers where the header says nothing."""
    layers = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_{letter}" for letter in "qkv"]
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(layers, 1):
        values = torch.diag(torch.tensor([4.0] * number + [1.0] * (8 - number)))
        tensors |= {f"{layer}.lora_A.weight": values, f"{layer}.lora_B.weight": torch.eye(8)}
    save_file(tensors, tmp_path / "a.safetensors")
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", RankRule(8, dynamic="sv_ratio", parameter=2))
    settings = json.loads(load_network(tmp_path / "b.safetensors").metadata["lora_adapter_metadata"])
    usual, special = settings["unet.r"], settings["unet.rank_pattern"]
    told = [special.get(layer.removeprefix("unet."), usual) for layer in layers]
    assert told == [1, 2, 3]
    usual, special = settings["unet.lora_alpha"], settings["unet.alpha_pattern"]
    assert [special.get(layer.removeprefix("unet."), usual) for layer in layers] == told


def test_a_core_and_a_scale_are_folded_in(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_up.weight": (24, 4), "lora_down.weight": (4, 8), "lora_mid.weight": (4, 4, 3, 3)}
    parts = {suffix: torch.randn(shape, generator=generator) for suffix, shape in shapes.items()}
    source = write(tmp_path / "a.safetensors", {"3x3": parts | {"scale": torch.tensor(0.3)}})
    resize(source, tmp_path / "b.safetensors", RankRule(2))
    assert load_file(tmp_path / "b.safetensors")[f"{NAMES['3x3']}.lora_down.weight"].shape == (2, 8, 3, 3)
    (exact,), (made,) = deltas(source).values(), deltas(tmp_path / "b.safetensors").values()
    assert (made - exact).norm() <= best(exact, 2) + 1e-5 * exact.norm()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_of_other_families_are_kept_as_they_are(tmp_path, family):
    layers = {"linear": lora()["linear"], "rows": family_tensors(family, SHAPES["rows"], 0)}
    source = write(tmp_path / "a.safetensors", layers)
    outcome = resize(source, tmp_path / "b.safetensors", RankRule(2))
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    is_lora = len(outcome.layers) == 2
    for key in before:
        if key.startswith(NAMES["rows"]) and not is_lora:
            assert torch.equal(before[key], after[key]), key
    assert bool(outcome.notes) != is_lora


REFUSED = {
    "no factors": (lambda: {"linear": family_tensors("LoHa", SHAPES["linear"], 0)}, JobError, "no layers with LoRA"),
    "NaN": (lambda: lora(size=math.nan), NonFiniteError, "NaN"),
    "factors that do not fit": (
        lambda: {"linear": {"lora_up.weight": torch.ones(4, 3), "lora_down.weight": torch.ones(2, 4)}},
        AdapterError,
        "share no rank",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_can_not_be_resized_is_refused_and_nothing_is_written(tmp_path, case):
    make, error, message = REFUSED[case]
    source = write(tmp_path / "a.safetensors", make())
    with pytest.raises(error, match=message):
        resize(source, tmp_path / "b.safetensors", RankRule(2))
    assert sorted(tmp_path.iterdir()) == [source]


def test_an_older_file_is_replaced_only_if_asked(tmp_path):
    source = write(tmp_path / "a.safetensors", lora())
    older = tmp_path / "b.safetensors"
    older.write_bytes(b"older")
    with pytest.raises(OutputError):
        resize(source, older, RankRule(2))
    assert older.read_bytes() == b"older"
    resize(source, older, RankRule(2), overwrite=True)
    assert load_network(older).ranks == (2,)


def test_a_link_is_refused(tmp_path):
    source = write(tmp_path / "a.safetensors", lora())
    (tmp_path / "b.safetensors").symlink_to(source)
    with pytest.raises(OutputError):
        resize(source, tmp_path / "b.safetensors", RankRule(2), overwrite=True)


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    source = write(tmp_path / "a.safetensors", lora())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr("lib_lora.tools.resize.truncated", None)
    with pytest.raises(OutputError, match="make room"):
        resize(source, tmp_path / "b.safetensors", RankRule(4))
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_cancelled_job_leaves_nothing(tmp_path):
    source = write(tmp_path / "a.safetensors", lora())

    def cancel(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resize(source, tmp_path / "b.safetensors", RankRule(2), progress=cancel)
    assert sorted(tmp_path.iterdir()) == [source]


def test_the_command_tells_ranks_and_errors(tmp_path, capsys):
    source = write(tmp_path / "a.safetensors", lora())
    out = tmp_path / "b.safetensors"
    options = ["--lora", str(source), "--out", str(out)]
    assert main(["resize", *options, "--rank", "4", "--conv-rank", "2", "--save-precision", "fp16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["dtype"], told["size"]) == (str(out), "float16", out.stat().st_size)
    assert sorted(layer["rank"] for layer in told["layers"]) == [2, 4, 4, 4]
    assert 0 < told["relative_error"] < 1
    assert main(["resize", *options, "--rank", "4"]) == 1
    assert "b.safetensors" in capsys.readouterr().err
    assert main(["resize", *options, "--rank", "3", "--dynamic", "sv_fro", "--dynamic-param", "0.9", "--force"]) == 0
    assert "ranks: " in capsys.readouterr().out
    assert main(["resize", *options, "--rank", "0", "--force"]) == 1
    assert "rank is 0" in capsys.readouterr().err


def test_every_refusal_is_one_sentence_for_users(tmp_path):
    with pytest.raises(PrefuseError, match="missing"):
        resize(tmp_path / "missing.safetensors", tmp_path / "b.safetensors", RankRule(2))
