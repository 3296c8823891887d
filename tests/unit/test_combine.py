"""Several LoRAs as one, beside the sum of whole matrices in float64."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lib_lora.__main__ import main
from lib_lora.catalog import LoraCatalog
from lib_lora.core.network import load_network
from lib_lora.errors import (
    AdapterError,
    BaseModelMismatchError,
    JobError,
    NamingError,
    NonFiniteError,
    OutputError,
    ShapeMismatchError,
)
from lib_lora.session import LoraSession
from lib_lora.tools.combine import combine
from lib_lora.tools.given import given_files
from lib_lora.tools.ranks import RankRule
from tests.family_files import FAMILIES, family_tensors, toys, write

if TYPE_CHECKING:
    from pathlib import Path

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
POINT = "lora_unet_mid_block_attentions_0_proj_in"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {LINEAR: (24, 16), CONV: (24, 8, 3, 3), POINT: (16, 24, 1, 1), TEXT: (16, 12)}
TOY_SHAPES = {"linear": (24, 16), "1x1": (16, 24, 1, 1), "3x3": (24, 8, 3, 3), "rows": (16, 16)}
SD1 = {"ss_base_model_version": "sd_v1"}

ERROR = {torch.float32: 2e-7, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of a stored sum, relative to the sum of the norms of what is added: one rounding of each factor."""
REPORTED = 0.02
"""Of a reported error, relative: rounding is not quite orthogonal to what was cut off."""


def lora(rank: int, alpha: float | None = None, dtype=torch.float32, seed: int = 0, names=tuple(SHAPES), size=0.3):
    """LoRA tensors of some layers, by their whole names."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        out, *rest = SHAPES[name]
        up = torch.randn(out, rank, *(1,) * len(rest[1:]), generator=generator)
        down = torch.randn(rank, *rest, generator=generator)
        layers[name] = {"lora_up.weight": (up * size).to(dtype), "lora_down.weight": (down * size).to(dtype)}
        if alpha is not None:
            layers[name]["alpha"] = torch.tensor(alpha).to(dtype)
    return layers


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Layer → ΔW in float64."""
    found = {}
    for name, adapter in load_network(path).adapters.items():
        found[name] = adapter.delta_weight(torch.empty(()).expand(adapter.shape)).double().flatten(1)
    return found


def exact_sum(paths_and_strengths) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Layer → Σ strength · ΔW, and Σ |strength| · ‖ΔW‖."""
    total: dict[str, torch.Tensor] = {}
    sizes: dict[str, float] = {}
    for path, strength in paths_and_strengths:
        for name, delta in deltas(path).items():
            total[name] = total.get(name, 0) + strength * delta
            sizes[name] = sizes.get(name, 0) + abs(strength) * delta.norm().item()
    return total, sizes


def asked(paths_and_strengths):
    return given_files([f"{path}:{strength}" for path, strength in paths_and_strengths])


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


def two(folder: Path, **options) -> list[tuple[Path, float]]:
    first = write(folder / "a.safetensors", lora(4, 2.0, seed=1, **options), SD1)
    return [(first, 0.6), (write(folder / "b.safetensors", lora(3, 1.0, seed=2, **options), SD1), -0.4)]


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
LDM_LINEAR = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


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


THIN = ("LoRA Tucker", "LoHa", "LoHa Tucker", "LoKr", "LoKr both factored")
DENSE = ("LoKr whole", "Full")
NEEDS_BASE = [family for family in FAMILIES if family not in ("LoRA", *THIN, *DENSE)]


def mixed(folder: Path, family: str, kind: str) -> list[tuple[Path, float]]:
    """One file of a family, one of LoRA."""
    other = write(folder / "a.safetensors", {kind: family_tensors(family, SHAPES[kind], 0)}, SD1)
    return [(other, 0.5), (write(folder / "b.safetensors", lora(2, names=(kind,)), SD1), -0.7)]


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


@pytest.mark.parametrize("family", DENSE)
def test_what_has_no_thin_factors_is_told_to_use_svd(tmp_path, family):
    with pytest.raises(AdapterError, match="a has no thin factors there"):
        combine(asked(mixed(tmp_path, family, LINEAR)), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("family", NEEDS_BASE)
def test_what_depends_on_the_model_is_told_to_be_merged(tmp_path, family):
    with pytest.raises(AdapterError, match="depends on the model's weights; merge it into a checkpoint and extract"):
        combine(asked(mixed(tmp_path, family, LINEAR)), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def bad_pairs(folder: Path) -> dict[str, tuple[list[str], type[Exception], str]]:
    """Case → files, error, and words of its sentence."""
    good = write(folder / "good.safetensors", lora(4, 1.0), SD1)
    files = {
        "xl": (lora(4), {"ss_base_model_version": "sdxl_base_v1-0"}),
        "nan": (lora(4, size=math.nan), SD1),
        "wide": ({LINEAR: {"lora_up.weight": torch.ones(24, 2), "lora_down.weight": torch.ones(2, 20)}}, SD1),
        "huge": (lora(4, 1.0, size=1e9), SD1),
        "bias": ({LINEAR: {"diff_b": torch.ones(24)}}, SD1),
        "ten": (lora(10, 1.0), SD1),
        "negative": (lora(4, -1.0), SD1),
        "strange": ({"lora_unet_somewhere_else": lora(4)[LINEAR]}, SD1),
        "twice": ({name: lora(4)[LINEAR] for name in (LINEAR, LDM_LINEAR)}, SD1),
        "empty": ({LINEAR: {"lora_up.weight": torch.ones(24, 0), "lora_down.weight": torch.ones(0, 16)}}, SD1),
    }
    at = {name: write(folder / f"{name}.safetensors", layers, said) for name, (layers, said) in files.items()}
    return {
        "another family": ([good, at["xl"]], BaseModelMismatchError, "good is for SD 1.x and xl for SDXL"),
        "NaN": ([good, at["nan"]], NonFiniteError, "nan: .*NaN"),
        "another shape": ([good, at["wide"]], ShapeMismatchError, "different shapes: good .24, 16., wide .24, 20."),
        "too large": ([at["huge"]], NonFiniteError, "beyond float16"),
        "a bias": ([good, at["bias"]], AdapterError, "bias or a norm"),
        "an unknown layer": ([good, at["strange"]], NamingError, "no layer named unet:somewhere_else"),
        "one layer twice": ([at["twice"]], NamingError, "are the same layer"),
        "rank 0 alone": ([at["empty"]], JobError, "nothing is left"),
        "strength 0": ([f"{good}:0"], JobError, "nothing is left"),
        "dyn 0": ([f"{good}:1:1:0"], JobError, "nothing is left"),
        "add of other ranks": ([good, at["ten"]], AdapterError, "equal ranks, these are 4, 10"),
        "add of other signs": ([good, at["negative"]], AdapterError, "alphas of one sign"),
    }


CASES = ("another family", "NaN", "another shape", "too large", "a bias", "an unknown layer", "one layer twice")
EMPTY = ("rank 0 alone", "strength 0", "dyn 0")


@pytest.mark.parametrize("case", [*CASES, *EMPTY, "add of other ranks", "add of other signs"])
def test_what_can_not_be_combined_is_refused_with_a_sentence_and_nothing_is_written(tmp_path, case):
    texts, error, words = bad_pairs(tmp_path)[case]
    before = sorted(tmp_path.iterdir())
    method = "add" if case.startswith("add") else "concat"
    with pytest.raises(error, match=words):
        given = given_files(map(str, texts))
        combine(given, tmp_path / "out.safetensors", method=method, dtype=torch.float16)
    assert sorted(tmp_path.iterdir()) == before


def test_what_has_strength_0_may_be_of_any_kind(tmp_path):
    layers = {LINEAR: family_tensors("DoRA of outputs", SHAPES[LINEAR]), TEXT: lora(2)[TEXT]}
    path = write(tmp_path / "a.safetensors", layers, SD1)
    combine(given_files([f"{path}:1:0"]), tmp_path / "out.safetensors")
    assert list(load_network(tmp_path / "out.safetensors").adapters) == ["te1:encoder_layers_0_mlp_fc1"]


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    loras = asked(two(tmp_path))
    before = sorted(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr("lib_lora.tools.combine.stacked", None)
    with pytest.raises(OutputError, match="make room"):
        combine(loras, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_add_is_for_lora_alone(tmp_path):
    with pytest.raises(AdapterError, match="add is for LoRA, a has LoHa there"):
        combine(asked(mixed(tmp_path, "LoHa", LINEAR)), tmp_path / "out.safetensors", method="add")


def test_files_that_are_there_stay_unless_forced(tmp_path):
    loras = asked(two(tmp_path))
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"older")
    with pytest.raises(OutputError):
        combine(loras, out)
    assert out.read_bytes() == b"older"
    combine(loras, out, overwrite=True)
    link = tmp_path / "link.safetensors"
    link.symlink_to(out)
    with pytest.raises(OutputError):
        combine(loras, link, overwrite=True)


def test_a_cancelled_job_leaves_nothing(tmp_path):
    loras = asked(two(tmp_path))
    before = sorted(tmp_path.iterdir())

    def cancel(done: int, total: int) -> None:
        if (done, total) == (3, 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        combine(loras, tmp_path / "out.safetensors", progress=cancel)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_can_take_its_own_place(tmp_path):
    loras = two(tmp_path)
    total, _ = exact_sum(loras)
    combine(asked(loras), loras[0][0], overwrite=True)
    assert all((delta - total[name]).norm() < 1e-6 for name, delta in deltas(loras[0][0]).items())


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
