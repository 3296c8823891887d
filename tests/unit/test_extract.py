"""Extraction of a LoRA from two checkpoints: families, layouts, what is left out, what is refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from ldm_files import write_checkpoint
from safetensors.torch import load_file, save_file
from tiny_pipelines import make_tiny, original_tensors

from lib_lora.__main__ import main
from lib_lora.catalog import LoraCatalog
from lib_lora.core.saving import save_tensors
from lib_lora.errors import (
    FileError,
    JobError,
    ModelError,
    NonFiniteError,
    OutputError,
    ShapeMismatchError,
)
from lib_lora.session import LoraSession
from lib_lora.tools.extract import extract

FAMILIES = ("sd1", "sd2", "sdxl")
COMPONENTS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
TARGETS = (".attentions.", ".resnets.", ".downsamplers.", ".upsamplers.", ".self_attn.", ".mlp.")
RANK = 2
SIZE = 0.3
WEIGHT_ERROR = 1e-5
UNET_LAYER = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
UNET_LAYER_NAME = "unet:down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT_LAYER = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"


def changed(parts):
    """The modules with an update of `RANK` in every layer that a C3Lier changes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in (parts[name] for name in COMPONENTS if name in parts):
            for name, weight in part.named_parameters():
                if weight.ndim > 1 and any(target in f".{name}" for target in TARGETS):
                    up = torch.randn(weight.shape[0], RANK, generator=generator)
                    down = torch.randn(RANK, weight[0].numel(), generator=generator)
                    weight.add_(SIZE * (up @ down).reshape(weight.shape))
    return parts


def write_parts(parts, folder):
    """As diffusers lays models out."""
    for name in COMPONENTS.keys() & parts.keys():
        (folder / name).mkdir(parents=True)
        save_tensors(folder / name / "model.safetensors", dict(parts[name].named_parameters()))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family → files and folders of base and tuned, and their modules."""
    root = tmp_path_factory.mktemp("models")
    return {family: dict(write_both(family, root / family)) for family in FAMILIES}


def write_both(family, folder):
    base = make_tiny(family, folder / "config").parts
    for kind, parts in (("base", base), ("tuned", changed(copy.deepcopy(base)))):
        yield kind, write_checkpoint(folder / f"{kind}.safetensors", original_tensors(family, parts))
        yield f"{kind} folder", write_parts(parts, folder / kind)
        yield f"{kind} parts", parts


@pytest.fixture
def sd1(models, tmp_path):
    """Extract from SD1 with options; a changed tuned model is written first."""

    def run(change=None, **options):
        base, tuned = models["sd1"]["base"], models["sd1"]["tuned"]
        if change is not None:
            weights = load_file(tuned)
            change(weights)
            tuned = tmp_path / "changed.safetensors"
            save_file(weights, tuned)
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        return extract(base, tuned, folder / "lora.safetensors", **{"rank": RANK, "conv_rank": RANK} | options)

    return run


LAYOUTS = [("base", "tuned"), ("base folder", "tuned"), ("base", "tuned folder")]


@pytest.mark.parametrize(
    ("family", "base", "tuned"),
    [("sd1", *LAYOUTS[0]), ("sd1", *LAYOUTS[1]), ("sd2", *LAYOUTS[0]), ("sd2", *LAYOUTS[2]), ("sdxl", *LAYOUTS[1])],
)
def test_the_lora_makes_the_tuned_model_of_the_base(models, family, base, tuned, tmp_path):
    extract(models[family][base], models[family][tuned], tmp_path / "lora.safetensors", rank=RANK, conv_rank=RANK)
    parts = copy.deepcopy(models[family]["base parts"])
    live = {short: parts[name] for name, short in COMPONENTS.items() if name in parts}
    report = LoraSession(live, LoraCatalog([tmp_path])).set([("lora", 1.0)])
    assert not report.refused
    assert report.applied[0].unmatched == 0
    for name in COMPONENTS.keys() & parts.keys():
        expected = dict(models[family]["tuned parts"][name].named_parameters())
        for path, weight in parts[name].named_parameters():
            assert torch.allclose(weight, expected[path], atol=WEIGHT_ERROR), f"{name}.{path}"


def test_both_layouts_give_the_same_file(models, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for out, kind in zip(files, ("", " folder"), strict=True):
        extract(models["sd2"][f"base{kind}"], models["sd2"][f"tuned{kind}"], out, rank=RANK)
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_outcome_tells_rank_norm_and_error_of_each_layer(sd1, models):
    outcome = sd1(rank=1, conv_rank=1)
    base, tuned = (load_file(models["sd1"][name]) for name in ("base", "tuned"))
    change = (tuned[UNET_LAYER].double() - base[UNET_LAYER].double()).flatten(1)
    values = torch.linalg.svdvals(change)
    layer = next(
        layer
        for layer in outcome.layers
        if layer.name.endswith("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q")
    )
    assert layer.rank == 1
    assert layer.norm == pytest.approx(values.norm().item(), rel=1e-5)
    assert layer.error == pytest.approx(values[1:].norm().item(), rel=2e-3)
    assert 0 < outcome.error < 1
    assert outcome.to_dict()["relative_error"] == outcome.error


@pytest.mark.parametrize("rank", [1, 4096])
def test_the_rank_is_at_most_that_of_the_layer(sd1, rank):
    for layer in sd1(rank=rank, conv_rank=rank).layers:
        assert layer.rank == min(rank, layer.rank_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_tensors_are_of_the_precision_asked_for(sd1, dtype):
    outcome = sd1(dtype=dtype)
    assert {tensor.dtype for tensor in load_file(outcome.path).values()} == {dtype}


@pytest.fixture
def slightly_tuned(models, tmp_path):
    """base → a tuned model whose text encoder differs by an amount in one number, its UNet in one layer."""

    def write(amount):
        weights = load_file(models["sd1"]["base"])
        weights[TEXT_LAYER][3, 2] += amount
        weights[UNET_LAYER] += 0.5
        save_file(weights, tmp_path / "slightly.safetensors")
        return models["sd1"]["base"], tmp_path / "slightly.safetensors", tmp_path / "lora.safetensors"

    return write


def test_a_text_encoder_that_is_as_good_as_untouched_is_left_out_and_told(slightly_tuned):
    outcome = extract(*slightly_tuned(0.008), rank=RANK)
    assert [layer.name.partition(":")[0] for layer in outcome.layers] == ["unet"]
    assert any("text encoder left out" in note and "0.008" in note and "0.01" in note for note in outcome.notes)


@pytest.mark.parametrize(("amount", "min_diff"), [(0.02, 0.01), (-0.02, 0.01), (0.008, 0.001)])
def test_one_number_that_differs_more_keeps_the_text_encoder(slightly_tuned, amount, min_diff):
    outcome = extract(*slightly_tuned(amount), rank=RANK, min_diff=min_diff)
    assert {layer.name for layer in outcome.layers} == {UNET_LAYER_NAME, "te1:encoder_layers_1_mlp_fc1"}
    assert any("the same in both" in note for note in outcome.notes)


def test_a_part_that_one_model_lacks_is_left_out_and_told(models, tmp_path):
    unet_only = tmp_path / "unet only"
    (unet_only / "unet").mkdir(parents=True)
    save_file(load_file(models["sd1"]["tuned folder"] / "unet/model.safetensors"), unet_only / "unet/model.safetensors")
    outcome = extract(models["sd1"]["base"], unet_only, tmp_path / "lora.safetensors", rank=RANK)
    assert {layer.name.partition(":")[0] for layer in outcome.layers} == {"unet"}
    assert "left out, for only one of the models has it: te1" in outcome.notes


def test_the_same_model_twice_is_nothing_to_extract(models, tmp_path):
    base = models["sd1"]["base"]
    with pytest.raises(JobError, match="nothing to extract"):
        extract(base, base, tmp_path / "lora.safetensors", rank=RANK)
    assert not list(tmp_path.iterdir())


def without(weights):
    del weights[UNET_LAYER]


def narrower(weights):
    weights[UNET_LAYER] = weights[UNET_LAYER][:, :-1].contiguous()


def spoiled(key, value):
    def change(weights):
        weights[key].view(-1)[5] = value

    return change


FAULTS = {
    "a layer is missing": (
        without,
        {},
        JobError,
        r"^changed.+lacks 1: down_blocks_0.+attn1_to_q$",
    ),
    "a shape differs": (narrower, {}, ShapeMismatchError, r"attn1_to_q is \((\d+), \1\) in the base.+in the tuned"),
    "NaN in the UNet": (spoiled(UNET_LAYER, math.nan), {}, NonFiniteError, r"attn1_to_q of the tuned model.+NaN"),
    "NaN in the text encoder": (spoiled(TEXT_LAYER, math.nan), {}, NonFiniteError, r"mlp_fc1 of the tuned model.+NaN"),
    "infinity": (spoiled(UNET_LAYER, -math.inf), {}, NonFiniteError, r"attn1_to_q of the tuned model"),
    "beyond fp16": (spoiled(UNET_LAYER, 1e30), {"dtype": torch.float16}, NonFiniteError, r"attn1_to_q.+float16.+bf16"),
    "rank 0": (None, {"rank": 0}, JobError, "rank is 0"),
    "conv rank -1": (None, {"conv_rank": -1}, JobError, "rank of convolutions is -1"),
    "clamp 0": (None, {"clamp": 0.0}, JobError, "quantile"),
    "clamp 2": (None, {"clamp": 2.0}, JobError, "quantile"),
    "clamp NaN": (None, {"clamp": math.nan}, JobError, "quantile"),
    "min diff NaN": (None, {"min_diff": math.nan}, JobError, "smallest difference"),
    "min diff -1": (None, {"min_diff": -1.0}, JobError, "smallest difference"),
    "no such device": (None, {"device": "warp"}, JobError, "device warp can not be used"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_and_leaves_nothing(sd1, tmp_path, fault):
    change, options, error, text = FAULTS[fault]
    with pytest.raises(error, match=text) as raised:
        sd1(change, **options)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").iterdir())


def test_nan_in_the_base_is_told_as_such(models, tmp_path):
    weights = load_file(models["sd1"]["base"])
    weights[UNET_LAYER][0, 0] = math.nan
    save_file(weights, tmp_path / "base.safetensors")
    with pytest.raises(NonFiniteError, match="of the base model"):
        extract(tmp_path / "base.safetensors", models["sd1"]["tuned"], tmp_path / "lora.safetensors", rank=RANK)


@pytest.mark.parametrize("kind", ["text", "missing", "lora", "empty folder"])
def test_what_is_no_model_is_refused(models, tmp_path, kind):
    path = tmp_path / "other"
    if kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "lora":
        save_file({"lora_unet_a.lora_up.weight": torch.ones(4, 4)}, path)
    elif kind == "empty folder":
        path.mkdir()
    with pytest.raises((FileError, ModelError)):
        extract(models["sd1"]["base"], path, tmp_path / "lora.safetensors", rank=RANK)
    assert not (tmp_path / "lora.safetensors").exists()


def test_an_existing_file_is_kept_unless_asked_otherwise(sd1):
    path = sd1().path
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        sd1(rank=1)
    assert path.read_bytes() == before
    sd1(rank=1, overwrite=True)
    assert path.read_bytes() != before


class CancelledError(Exception):
    pass


@pytest.mark.parametrize("part", [0.01, 0.5, 1])
def test_a_job_that_is_cancelled_leaves_nothing(sd1, tmp_path, part):
    def progress(done, total):
        if done >= part * total:
            raise CancelledError

    with pytest.raises(CancelledError):
        sd1(progress=progress)
    assert not list((tmp_path / "out").iterdir())


def test_the_command_writes_and_tells(models, tmp_path, capsys):
    files = ["--base", str(models["sd1"]["base"]), "--tuned", str(models["sd1"]["tuned"])]
    out = tmp_path / "lora.safetensors"
    command = ["extract", *files, "--rank", "2", "--conv-rank", "1", "--save-precision", "fp16", "--out", str(out)]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(out)
    assert told["dtype"] == "float16"
    assert len(told["layers"]) == len([key for key in load_file(out) if key.endswith(".alpha")])
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert "error:" in capsys.readouterr().out


def test_a_refusal_is_one_line_on_stderr(models, tmp_path, capsys):
    base = str(models["sd1"]["base"])
    assert main(["extract", "--base", base, "--tuned", base, "--out", str(tmp_path / "a.safetensors")]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
