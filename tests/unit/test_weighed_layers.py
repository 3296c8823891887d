"""Block weights on a model: what `<lora:x:1:lbw=…>` makes of it, beside a file whose layers were weighed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_lora import LoraSession
from lib_lora.core.keymap import KeyMap
from lib_lora.core.saving import save_tensors
from lib_lora.prompt.tags import parse_prompt
from tests.family_files import FAMILIES, family_tensors
from tests.toys import c3lier, digest, kohya_name, lierla, lora_tensors, sd1_unet, sdxl_unet, text_encoder, write_lora

INDEX = json.loads((Path(__file__).parents[1] / "golden/fullsize/block_index.json").read_text())
NAMES = ["M00" if name == "MID" else name for name in INDEX["lbw_names"]]
SD1_LIST = [(-1) ** index * (index + 1) / 32 for index in range(26)]
FLOAT_ERROR = 2e-6
"""Absolute, on weights of order 1."""


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return SimpleNamespace(unet=sd1_unet(), text_encoder=text_encoder(), vae=None)


@pytest.fixture(scope="module")
def keymap(pipe):
    return KeyMap.from_modules({"unet": pipe.unet, "te1": pipe.text_encoder})


@pytest.fixture
def session(pipe, tmp_path):
    session = LoraSession.for_pipeline(pipe, tmp_path)
    yield session
    session.unload()


def listed(numbers) -> str:
    return f"lbw={','.join(map(str, numbers))}"


def block_factor(layer, numbers) -> float:
    return dict(zip(NAMES, numbers, strict=True)).get(layer.block, 1.0)


def weights(pipe) -> str:
    return digest(pipe.unet, pipe.text_encoder)


def every_weight(session) -> dict[str, torch.Tensor]:
    return {layer.key: layer.live().clone() for layer in session.keymap.parameters}


@pytest.mark.parametrize("mode", ["prefuse", "hook"])
def test_a_list_equals_a_file_whose_ups_were_scaled_by_hand(session, pipe, keymap, tmp_path, mode):
    layers = c3lier(keymap)
    tensors = lora_tensors(layers, seed=1)
    save_tensors(tmp_path / "ink.safetensors", tensors, {})
    powers = [2.0 ** (index % 5 - 2) for index in range(26)]  # exact in every product
    for layer in layers:
        tensors[f"{kohya_name(layer)}.lora_up.weight"] *= block_factor(layer, powers)
    save_tensors(tmp_path / "weighed.safetensors", tensors, {})
    session.mode = mode
    inputs = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([10])
    context = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    results = []
    with torch.no_grad():
        for request in ("<lora:weighed:0.75>", f"<lora:ink:0.75:{listed(powers)}>"):
            session.set(request)
            results.append((weights(pipe), pipe.unet(*inputs, context).sample))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def family_file(family: str, layers, biases) -> dict[str, torch.Tensor]:
    """Tensors of every layer that the family can change; norms and biases as the families' trainers write them."""
    names = {layer.key: kohya_name(layer) for layer in layers}
    if family == "norm":
        return {f"{names[one.key]}.{part}_norm": torch.ones(one.shape) for one in layers for part in "wb"}
    if family == "bias":
        weights = {f"{names[one.key]}.diff": torch.ones(one.shape) for one in layers}
        return weights | {f"{names[key]}.diff_b": torch.ones(biases[key]) for key in names if key in biases}
    parts = {one.key: family_tensors(family, one.shape, seed=len(one.key)) for one in layers}
    return {f"{names[key]}.{suffix}": part for key, some in parts.items() for suffix, part in some.items()}


@pytest.mark.parametrize("family", [*FAMILIES, "norm", "bias"])
def test_a_weight_is_a_factor_on_what_the_layer_would_change_in_every_family(session, keymap, tmp_path, family):
    biases = {one.key.removesuffix(".bias"): one.shape for one in keymap.parameters if one.key.endswith(".bias")}
    divisible = [one for one in lierla(keymap) if len(one.shape) == 2 and not any(side % 8 for side in one.shape)]
    layers = [one for one in keymap if ".norm" in one.key] if family == "norm" else divisible
    save_tensors(tmp_path / "x.safetensors", family_file(family, layers, biases), {})
    base = every_weight(session)
    session.set([("x", 1.0)])
    whole = every_weight(session)
    assert session.set(f"<lora:x:1:{listed(SD1_LIST)}>").refused == ()
    weighed = every_weight(session)
    for one in keymap.parameters:
        change = block_factor(one, SD1_LIST) * (whole[one.key] - base[one.key])
        error = (weighed[one.key] - base[one.key] - change).abs().max().item()
        assert error < FLOAT_ERROR * max(1.0, whole[one.key].abs().max().item()), one.key
    assert sum(not torch.equal(weighed[key], base[key]) for key in base) >= len(layers)


@pytest.mark.parametrize(("length", "builder"), [(26, sd1_unet), (17, sd1_unet), (20, sdxl_unet), (12, sdxl_unet)])
def test_each_block_alone_changes_exactly_its_layers(tmp_path, length, builder):
    pipe = SimpleNamespace(unet=builder(), text_encoder=text_encoder(), vae=None)
    session = LoraSession.for_pipeline(pipe, tmp_path)
    layers = [*c3lier(session.keymap), *(one for one in session.keymap if one.key == "unet.conv_in")]
    write_lora(tmp_path / "all.safetensors", layers, rank=1)
    base = every_weight(session)
    for position, index in enumerate(INDEX["lbw_target_idx"][str(length)]):
        session.set(f"<lora:all:1:{listed(int(number == position) for number in range(length))}>")
        changed = {one.key for one in session.keymap if not torch.equal(one.live(), base[one.key])}
        assert changed == {one.key for one in layers if one.block == NAMES[index]}
    assert sum(one.block == "" for one in layers) == 0


def test_what_lies_outside_of_the_blocks_keeps_the_whole_strength(session, keymap, tmp_path):
    outside = [one for one in keymap if one.block == "" and "norm" not in one.key]
    write_lora(tmp_path / "head.safetensors", [*outside, *lierla(keymap)], seed=1)
    base = every_weight(session)
    session.set("<lora:head:0.5:lbw=NONE>")
    changed = {one.key for one in session.keymap if not torch.equal(one.live(), base[one.key])}
    assert (
        changed
        == {one.key for one in outside}
        == {"unet.time_embedding.linear_1", "unet.time_embedding.linear_2", "unet.conv_out"}
    )


ELEMENT_LAYERS = [
    ("IN04-OUT05;attn2;0", lambda one: ".attn2." in one.key and one.block in NAMES[5:20]),
    (";attn2.to_k;0", lambda one: one.key.endswith(".attn2.to_k")),
    ("NOT BASE;;0", lambda one: one.block != "BASE"),
    ("OUT;emb_layers;0", lambda one: one.key.startswith("unet.up_blocks") and "time_emb_proj" in one.key),
    ("BASE;mlp;0", lambda one: one.component == "te1" and ".mlp." in one.key),
    (";transformer;0", lambda one: one.component == "te1" or ".transformer_blocks." in one.key),
]


@pytest.mark.parametrize(("rules", "chosen"), ELEMENT_LAYERS)
def test_elements_are_found_by_the_names_of_the_original_model(session, keymap, tmp_path, rules, chosen):
    layers = c3lier(keymap)
    write_lora(tmp_path / "ink.safetensors", layers, seed=1)
    base = every_weight(session)
    session.set(f"<lora:ink:1:lbwe={rules}>")
    weighed = every_weight(session)
    unchanged = {one.key for one in layers if torch.equal(weighed[one.key], base[one.key])}
    assert unchanged == {one.key for one in layers if chosen(one)} != set()


def test_a_preset_that_was_edited_changes_the_weights_of_the_same_tag(session, pipe, keymap, tmp_path):
    write_lora(tmp_path / "ink.safetensors", lierla(keymap), seed=1)
    presets, keys = tmp_path / "lbwpresets.txt", []
    for numbers in ([1] * 17, [0.5] * 17, [1] * 17):
        presets.write_text(f"MY:{','.join(map(str, numbers))}\n# {len(keys)}")
        session.set("<lora:ink:1:lbw=MY>")
        keys.append((session.applied_key, weights(pipe)))
    assert keys[0] == keys[2]
    assert keys[0][0] != keys[1][0]
    session.set("<lora:ink:0.5>")
    assert keys[1] == (session.applied_key, weights(pipe))


def test_a_seed_repeats_the_drawn_weights_and_the_resolved_tag_needs_no_seed(session, pipe, keymap, tmp_path):
    write_lora(tmp_path / "ink.safetensors", lierla(keymap), seed=1)
    tag = f"<lora:ink:0.8:0.5:dyn=3:lbw={'R,' * 16}U>"
    session.set(parse_prompt(tag, seed=1))
    first, resolved = weights(pipe), session.active[0].resolved
    session.set(parse_prompt(tag, seed=2))
    assert weights(pipe) != first
    session.set(parse_prompt(resolved, seed=3))
    assert weights(pipe) == first
    session.set(parse_prompt(tag, seed=1))
    assert weights(pipe) == first


def test_a_tag_with_weights_that_mean_nothing_is_refused_alone(session, pipe, keymap, tmp_path):
    write_lora(tmp_path / "ink.safetensors", lierla(keymap), seed=1)
    session.set([("ink", 0.5)])
    expected = weights(pipe)
    report = session.set("<lora:ink:0.5><lora:ink:1:lbw=NO SUCH><lora:ink:1:lbw=1,2>")
    assert weights(pipe) == expected
    assert [lora.weights for lora in report.applied] == [""]
    assert len(report.refused) == 2
    assert "lbw names no preset 'NO SUCH'" in report.refused[1].reason


def test_the_report_tells_the_weights(session, keymap, tmp_path):
    write_lora(tmp_path / "ink.safetensors", lierla(keymap), seed=1)
    report = session.set("<lora:ink:0.8:lbw=IND:in=0.5>")
    text = "lbw=1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0:in=0.5"
    assert report.applied[0].weights == text
    assert f"ink at 0.8, {text}: LoRA rank 4, 210 of 210 layers" in str(report)
    assert report.applied[0].resolved == f"<lora:ink:0.8:{text}>"


def test_a_slider_keeps_the_block_weights(session, pipe, keymap, tmp_path):
    write_lora(tmp_path / "ink.safetensors", lierla(keymap), seed=1)
    write_lora(tmp_path / "wash.safetensors", lierla(keymap), seed=2)
    session.set("<lora:ink:0.3:lbw=IND><lora:wash:1>")
    exact, target = weights(pipe), every_weight(session)
    session.set("<lora:ink:0.9:lbw=IND><lora:wash:1>")
    with session.tuning("ink") as turn:
        turn(0.3)
        assert all((weight - target[key]).abs().max() < FLOAT_ERROR for key, weight in every_weight(session).items())
    assert weights(pipe) == exact
