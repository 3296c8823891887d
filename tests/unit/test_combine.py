"""Several LoRAs as one, beside the sum of whole matrices in float64."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lib_lora.__main__ import main
from lib_lora.catalog import LoraCatalog
from lib_lora.core.network import load_network
from lib_lora.session import LoraSession
from lib_lora.tools.combine import combine
from lib_lora.tools.given import given_files
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.resize import resize
from tests.combine_files import (
    CONV,
    DENSE,
    LDM_LINEAR,
    LINEAR,
    POINT,
    SD1,
    SHAPES,
    TEXT,
    THIN,
    TOY_SHAPES,
    asked,
    deltas,
    exact_sum,
    lora,
    mixed,
    two,
)
from tests.family_files import family_tensors, toys, write
from tests.unit.test_peak_memory import Allocations

if TYPE_CHECKING:
    from pathlib import Path

ERROR = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of a stored sum, relative to the sum of the norms of what is added: one rounding of each factor."""
REPORTED = 0.02
"""Of a reported error, relative: rounding is not quite orthogonal to what was cut off."""


parts = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.sampled_from([None, 0.5, 1.0, 7.3, -2.0]),
        st.sampled_from([-1.3, -0.4, 0.1, 1.0, 2.0]),
        st.sampled_from(list(ERROR)),
        st.sets(st.sampled_from(list(SHAPES)), min_size=1),
    ),
    min_size=1,
    max_size=4,
)


@given(parts, st.sampled_from([None, *ERROR]))
@settings(max_examples=40, deadline=None)
def test_concat_is_the_exact_sum_whatever_ranks_alphas_types_and_layers_there_are(tmp_path_factory, parts, dtype):
    folder = tmp_path_factory.mktemp("combine")
    loras = [
        (write(folder / f"{seed}.safetensors", lora(rank, alpha, kind, seed, sorted(names)), SD1), strength)
        for seed, (rank, alpha, strength, kind, names) in enumerate(parts)
    ]
    outcome = combine(asked(loras), folder / "out.safetensors", dtype=dtype)
    total, sizes = exact_sum(loras)
    made = deltas(folder / "out.safetensors")
    adapters = load_network(folder / "out.safetensors").adapters
    assert made.keys() == total.keys()
    stored = next(iter(load_file(folder / "out.safetensors").values())).dtype
    assert dtype in (None, stored)
    for name, exact in total.items():
        assert adapters[name].rank == sum(deltas_of.rank for deltas_of in at(loras, name))
        assert (made[name] - exact).norm() <= ERROR[stored] * sizes[name], name
    assert outcome.error < 0.02 or any(sizes[name] > 3 * total[name].norm() for name in total)


def at(loras, name: str):
    """The adapters of one layer."""
    networks = (load_network(path).adapters for path, _ in loras)
    return [adapters[name] for adapters in networks if name in adapters]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("method", ["concat", "svd", "add"])
def test_reported_errors_are_the_true_ones(tmp_path, method, dtype):
    ranks = {"svd": (4, 3), "concat": (4, 3), "add": (4, 4)}[method]
    loras = [
        (write(tmp_path / f"{seed}.safetensors", lora(rank, 2.0 + seed, torch.float64, seed), SD1), 0.6 - seed)
        for seed, rank in enumerate(ranks)
    ]
    rule = RankRule(3, 2) if method == "svd" else None
    outcome = combine(asked(loras), tmp_path / "out.safetensors", method=method, rule=rule, dtype=dtype)
    (total, _), made = exact_sum(loras), deltas(tmp_path / "out.safetensors")
    for name, exact in total.items():
        layer = next(layer for layer in outcome.layers if layer.name.endswith(name.partition(":")[2]))
        error = (made[name] - exact).norm().item()
        assert layer.norm == pytest.approx(exact.norm().item(), rel=1e-5)
        # float32's own products stand beside what is measured here
        assert layer.error == pytest.approx(error, rel=REPORTED, abs=2e-7 * layer.norm)
    whole = math.hypot(*(exact.norm().item() for exact in total.values()))
    wrong = math.hypot(*((made[name] - exact).norm().item() for name, exact in total.items()))
    assert outcome.error == pytest.approx(wrong / whole, rel=REPORTED, abs=2e-7)


@pytest.mark.parametrize("rule", [RankRule(3), RankRule(5, 2), RankRule(64)])
def test_svd_is_the_best_approximation_of_the_sum(tmp_path, rule):
    loras = two(tmp_path)
    outcome = combine(asked(loras), tmp_path / "out.safetensors", method="svd", rule=rule)
    total, _ = exact_sum(loras)
    made = deltas(tmp_path / "out.safetensors")
    for layer, name in zip(outcome.layers, total, strict=True):
        assert layer.rank == min(rule.largest(SHAPES[layer.name]), 7)
        best = torch.linalg.svdvals(total[name])[layer.rank :].norm()
        assert (made[name] - total[name]).norm() <= best + 1e-6 * total[name].norm()


def test_a_sign_goes_into_up_alone_and_a_power_of_two_loses_nothing(tmp_path):
    source = write(tmp_path / "a.safetensors", lora(4, 1.0, torch.float16), SD1)
    combine(asked([(source, -0.5)]), tmp_path / "out.safetensors")
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    for name in SHAPES:
        ratio = after[f"{name}.lora_down.weight"].float() / before[f"{name}.lora_down.weight"].float()
        assert (ratio > 0).all()
    exact, made = exact_sum([(source, -0.5)])[0], deltas(tmp_path / "out.safetensors")
    assert all(torch.allclose(exact[name], made[name], rtol=0, atol=1e-9) for name in exact)


@pytest.mark.parametrize("size", [3e-3, 0.1, 30.0])
def test_small_and_large_numbers_keep_their_digits_in_fp16(tmp_path, size):
    loras = [(write(tmp_path / "a.safetensors", lora(4, 0.1, size=size), SD1), 0.1)]
    outcome = combine(asked(loras), tmp_path / "out.safetensors", dtype=torch.float16)
    assert outcome.error < ERROR[torch.float16]


PEFT_LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def spelled(path: Path, up: str, down: str, metadata: dict[str, str], seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {up: torch.randn(24, 4, generator=generator), down: torch.randn(4, 16, generator=generator)}
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("family", ["sd_v1", "sdxl_base_v1-0"])
def test_one_layer_in_three_spellings_is_one_layer(tmp_path, family):
    names = {
        "peft": (f"{PEFT_LINEAR}.lora_B.weight", f"{PEFT_LINEAR}.lora_A.weight"),
        "kohya": (f"{LINEAR}.lora_up.weight", f"{LINEAR}.lora_down.weight"),
        "ldm": (f"{LDM_LINEAR}.lora_up.weight", f"{LDM_LINEAR}.lora_down.weight"),
    }
    said = {"ss_base_model_version": family}
    loras = [
        (spelled(tmp_path / f"{kind}.safetensors", *keys, said, seed), 0.5)
        for seed, (kind, keys) in enumerate(names.items())
    ]
    combine(asked(loras), tmp_path / "out.safetensors")
    key = LINEAR if family == "sd_v1" else LDM_LINEAR
    assert set(load_file(tmp_path / "out.safetensors")) == {
        f"{key}.lora_up.weight",
        f"{key}.lora_down.weight",
        f"{key}.alpha",
    }
    exact = sum(0.5 * delta for path, _ in loras for delta in deltas(path).values())
    (made,) = deltas(tmp_path / "out.safetensors").values()
    assert (made - exact).norm() < 1e-6 * exact.norm()


def test_both_spellings_of_the_only_text_encoder_are_one(tmp_path):
    other = TEXT.replace("lora_te_", "lora_te1_")
    first = write(tmp_path / "a.safetensors", lora(2, names=(TEXT,)), SD1)
    second = write(tmp_path / "b.safetensors", {other: lora(3, seed=1)[TEXT]}, SD1)
    combine(asked([(first, 1.0), (second, 1.0)]), tmp_path / "out.safetensors")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "out.safetensors")} == {TEXT}
    assert load_network(tmp_path / "out.safetensors").ranks == (5,)


@pytest.mark.newest
@pytest.mark.parametrize("method", ["concat", "svd", "resize"])
def test_nothing_of_the_size_of_the_product_is_ever_in_memory(tmp_path, method):
    out, columns, rank = 640, 5760, 8
    generator = torch.Generator().manual_seed(0)
    layer = {
        "lora_up.weight": torch.randn(out, rank, 1, 1, generator=generator).half(),
        "lora_down.weight": torch.randn(rank, columns // 9, 3, 3, generator=generator).half(),
    }
    path = write(tmp_path / "a.safetensors", {CONV: layer}, SD1)
    factors = 2 * (out + columns) * rank * 2
    loras = asked([(path, 0.5), (path, -0.2)])
    with Allocations() as allocations:
        if method == "resize":
            resize(path, tmp_path / "out.safetensors", RankRule(4))
        else:
            rule = RankRule(4) if method == "svd" else None
            combine(loras, tmp_path / "out.safetensors", method=method, rule=rule)
    assert allocations.peak < 20 * factors < out * columns * 4 / 2


def test_a_model_with_the_combination_is_the_model_with_all_of_them(tmp_path):
    """Of a model of no known family: its layers keep the names that the files have."""
    for seed, name in enumerate("ab"):
        layers = {kind: family_tensors("LoRA", shape, seed) for kind, shape in TOY_SHAPES.items()}
        write(tmp_path / f"{name}.safetensors", layers)
    combine(asked([(tmp_path / "a.safetensors", 0.7), (tmp_path / "b.safetensors", -0.3)]), tmp_path / "c.safetensors")
    states = []
    for request in ([("a", 0.7), ("b", -0.3)], [("c", 1.0)]):
        components = toys()
        report = LoraSession(components, LoraCatalog([tmp_path])).set(request)
        assert [lora.layers for lora in report.applied] == [4] * len(request)
        states.append({k: v for module in components.values() for k, v in module.state_dict().items()})
    assert all((states[0][key] - states[1][key]).abs().max() < 1e-6 for key in states[0])


def test_text_encoder_unet_and_blocks_have_their_own_strengths(tmp_path):
    path = write(tmp_path / "a.safetensors", lora(4), SD1)
    only_middle = ",".join("1" if number == 7 else "0.5" for number in range(17))
    combine(given_files([f"{path}:0.5:2:lbw={only_middle}"]), tmp_path / "out.safetensors")
    exact, made = deltas(path), deltas(tmp_path / "out.safetensors")
    for name, delta in exact.items():
        assert torch.allclose(made[name], delta * (0.25 if name.startswith("te") else 2.0), atol=1e-6)


def test_layers_of_strength_0_are_left_out_and_dyn_cuts_ranks(tmp_path):
    path = write(tmp_path / "a.safetensors", lora(4), SD1)
    combine(given_files([f"{path}:0:1:2"]), tmp_path / "out.safetensors")
    network = load_network(tmp_path / "out.safetensors")
    assert len(network.adapters) == 3
    assert network.ranks == (2,)


@pytest.mark.parametrize("kind", [LINEAR, CONV, POINT])
@pytest.mark.parametrize("family", THIN + DENSE)
def test_svd_makes_lora_of_other_families(tmp_path, family, kind):
    loras = mixed(tmp_path, family, kind)
    total, sizes = exact_sum(loras)
    combine(asked(loras), tmp_path / "out.safetensors", method="svd", rule=RankRule(99))
    (made,), (exact,), (size,) = deltas(tmp_path / "out.safetensors").values(), total.values(), sizes.values()
    assert (made - exact).norm() < 2e-6 * size
    assert load_file(tmp_path / "out.safetensors")[f"{kind}.lora_down.weight"].shape[1:] == SHAPES[kind][1:]
    outcome = combine(asked(loras), tmp_path / "b4.safetensors", method="svd", rule=RankRule(4))
    (made,) = deltas(tmp_path / "b4.safetensors").values()
    error = (made - exact).norm().item()
    assert error <= 1.001 * torch.linalg.svdvals(exact)[4:].norm().item() + 2e-6 * size
    assert outcome.layers[0].error == pytest.approx(error, rel=REPORTED)


@pytest.mark.parametrize("family", THIN)
def test_concat_keeps_the_factors_of_other_families(tmp_path, family):
    loras = mixed(tmp_path, family, CONV)
    total, sizes = exact_sum(loras)
    combine(asked(loras), tmp_path / "out.safetensors")
    (made,), (exact,), (size,) = deltas(tmp_path / "out.safetensors").values(), total.values(), sizes.values()
    assert (made - exact).norm() < 2e-6 * size


def test_the_file_says_what_it_is_made_of(tmp_path):
    loras = two(tmp_path)
    combine(given_files([f"{loras[0][0]}:0.6:0.5", f"{loras[1][0]}:-0.4"]), tmp_path / "out.safetensors")
    said = load_network(tmp_path / "out.safetensors").metadata
    assert (said["ss_network_dim"], said["ss_base_model_version"], said["modelspec.title"]) == ("7", "sd_v1", "out")
    assert said["modelspec.merged_from"] == "a, b"
    recipe = json.loads(said["prefuse.recipe"])
    assert recipe["method"] == "concat"
    assert [(lora["file"], lora["te"], lora["unet"]) for lora in recipe["loras"]] == [
        ("a.safetensors", 0.6, 0.5),
        ("b.safetensors", -0.4, -0.4),
    ]
    assert all(len(lora["sha256"]) == 64 for lora in recipe["loras"])


def test_the_command_does_what_the_function_does(tmp_path, capsys):
    (first, _), (second, _) = two(tmp_path)
    out = tmp_path / "out.safetensors"
    options = ["combine", "--lora", f"{first}:0.6", "--lora", f"{second}:-0.4", "--out", str(out)]
    assert main([*options, "--method", "svd", "--rank", "3", "--conv-rank", "2", "--save-precision", "bf16"]) == 0
    assert "ranks: 2 (1 layers), 3 (3 layers)" in capsys.readouterr().out
    assert main([*options, "--json", "--force"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [layer["rank"] for layer in told["layers"]] == [7] * 4
    assert told["relative_error"] < 1e-6
    assert main([*options, "--force", "--method", "svd"]) == 1
    assert "needs a --rank" in capsys.readouterr().err
    assert main([*options, "--force", "--rank", "3"]) == 1
    assert "belongs to the method svd" in capsys.readouterr().err
    assert main([*options, "--force", "--method", "svd", "--rank", "0"]) == 1
    assert "rank is 0" in capsys.readouterr().err


def test_what_has_strength_0_may_be_of_any_kind(tmp_path):
    layers = {LINEAR: family_tensors("DoRA of outputs", SHAPES[LINEAR]), TEXT: lora(2)[TEXT]}
    path = write(tmp_path / "a.safetensors", layers, SD1)
    combine(given_files([f"{path}:1:0"]), tmp_path / "out.safetensors")
    assert list(load_network(tmp_path / "out.safetensors").adapters) == ["te1:encoder_layers_0_mlp_fc1"]
