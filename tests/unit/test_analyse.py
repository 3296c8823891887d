"""Where a LoRA's change lies, from the file alone."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from fullsize import facts
from safetensors.numpy import load_file
from toys import c3lier, lierla, lora_tensors, sd1_unet, sdxl_unet, text_encoder

from lib_lora.__main__ import main
from lib_lora.core.blocks import OUTSIDE
from lib_lora.core.keymap import KeyMap
from lib_lora.core.lora_names import original_name
from lib_lora.core.models import BaseModel
from lib_lora.core.saving import save_tensors
from lib_lora.errors import FileError, JobError, PrefuseError
from lib_lora.prompt.block_names import LISTS
from lib_lora.prompt.elements import read_rules
from lib_lora.tools.analyse import analyse_blocks, element_of
from lib_lora.tools.convert import convert_lora
from lib_lora.tools.inspect import GivenModel, inspect_file

GOLDEN = Path(__file__).parents[1] / "golden/sd1"
NORM_ERROR = 1e-6
"""Relative; files hold fp16 and fp32, sums are in float64 on both sides."""
CONVERTED_ERROR = 1e-3
FACTORS = (".lora_up.weight", ".lora_down.weight", ".alpha")


def kohya_block(name: str) -> str:
    """As kohya's own table has it."""
    table = facts("block_index")
    block = table["lbw_names"][table["sd1_lbw_index"][name]]
    return "M00" if block == "MID" else block


def squares_of(path: Path) -> dict[str, float]:
    """Kohya's layer name → ‖ΔW‖², in numpy and float64."""
    tensors = load_file(path)
    names = {name.removesuffix(FACTORS[0]) for name in tensors if name.endswith(FACTORS[0])}
    squares = {}
    for name in names:
        up, down = (tensors[f"{name}{factor}"].astype(np.float64) for factor in FACTORS[:2])
        scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
        squares[name] = float(np.sum((scale * up.reshape(len(up), -1) @ down.reshape(len(down), -1)) ** 2))
    return squares


def write(folder: Path, layers, extra=None, metadata=None) -> Path:
    save_tensors(folder / "lora.safetensors", lora_tensors(layers) | (extra or {}), metadata)
    return folder / "lora.safetensors"


@pytest.mark.parametrize(("name", "length"), [("lora_A", 17), ("lora_D_c3lier", 26), ("lora_E_c3lier", 26)])
def test_blocks_have_the_shares_of_kohyas_layers_in_float64(name, length):
    squares = squares_of(GOLDEN / f"{name}.safetensors")
    whole, expected = math.fsum(squares.values()), defaultdict(float)
    for layer, square in squares.items():
        expected[kohya_block(layer)] += square / whole
    found = analyse_blocks(GOLDEN / f"{name}.safetensors")
    assert found.length == length
    assert found.blocks == tuple(LISTS[length])
    shares = found.block_shares()
    assert {block for block, share in shares.items() if share} == set(expected) == set(found.present)
    assert [shares[block] for block in expected] == pytest.approx(list(expected.values()), rel=NORM_ERROR)
    assert found.notes == ()


def test_elements_are_parts_of_the_original_librarys_names():
    """Kohya's names, through the converter's table of names, to the part behind the block."""
    table = {name.replace(".", "_"): of["ldm"] for name, of in facts("sd1_unet_diffusers_to_ldm").items()}
    expected = defaultdict(float)
    squares = squares_of(GOLDEN / "lora_D_c3lier.safetensors")
    for name, square in squares.items():
        if name.startswith("lora_unet_"):
            ldm = table[f"{name.removeprefix('lora_unet_')}_weight"].removesuffix(".weight")
            ends = [one for one in ELEMENTS if ldm.endswith(f".{one}")]
            expected[max(ends, key=len)] += square
    found = analyse_blocks(GOLDEN / "lora_D_c3lier.safetensors").element_shares()
    whole = math.fsum(squares.values())
    assert {element for element in found if element not in TEXT_ELEMENTS} == set(expected)
    for element, square in expected.items():
        assert found[element] == pytest.approx(square / whole, rel=NORM_ERROR)


def test_original_names_are_those_of_the_converters_table():
    for name, of in facts("sd1_unet_diffusers_to_ldm").items():
        path, _, kind = name.rpartition(".")
        if kind == "weight":
            found = original_name(f"unet:{path.replace('.', '_')}", BaseModel.SD1)
            assert found == of["ldm"].removesuffix(".weight")


ELEMENTS = (
    *(f"attn{number}.{part}" for number in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "op", "conv"),
    *("in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection"),
)
TEXT_ELEMENTS = {"mlp.fc1", "mlp.fc2", *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out"))}


@pytest.mark.parametrize("make", [sd1_unet, sdxl_unet])
def test_a_rule_with_a_blocks_element_weighs_just_its_layers(tmp_path, make):
    layers = c3lier(KeyMap.from_modules({"unet": make(), "te1": text_encoder()}))
    found = analyse_blocks(write(tmp_path, layers))
    names = [f"{layer.original.replace('.', '_')}{layer.block}" for layer in layers]
    for (block, element), cell in found.cells.items():
        (rule,) = read_rules(f"{block}:{element}:0.5")
        hit = [name for name in names if rule.fits(name)]
        # "conv" is also in "conv_in" and the like, "proj" in others: a rule may say more, never less.
        assert len(hit) >= cell.layers > 0
        if element not in ("conv", "op"):
            assert len(hit) == cell.layers, (block, element)


@pytest.mark.parametrize(
    ("make", "choose", "length"),
    [(sd1_unet, lierla, 17), (sd1_unet, c3lier, 26), (sdxl_unet, lierla, 12), (sdxl_unet, c3lier, 20)],
)
def test_the_list_is_the_shortest_that_has_all_blocks(tmp_path, make, choose, length):
    found = analyse_blocks(write(tmp_path, choose(KeyMap.from_modules({"unet": make()}))))
    assert (found.length, found.blocks) == (length, tuple(LISTS[length]))


def test_every_layout_gives_the_same(tmp_path):
    convert_lora(GOLDEN / "lora_D_c3lier.safetensors", "peft", tmp_path / "b.safetensors")
    ours, theirs = analyse_blocks(GOLDEN / "lora_D_c3lier.safetensors"), analyse_blocks(tmp_path / "b.safetensors")
    assert set(ours.shares) == set(theirs.shares)
    for place, share in ours.shares.items():
        assert theirs.shares[place] == pytest.approx(share, rel=CONVERTED_ERROR)


@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "attn1.to_q"),
        ("input_blocks.0.0", "input_blocks.0.0"),
        ("middle_block.0.out_layers.3", "out_layers.3"),
        ("double_blocks_0_img_attn_qkv", "img_attn_qkv"),
        ("single_transformer_blocks_3_attn_to_q", "attn_to_q"),
        ("encoder_block_3_layer_0_SelfAttention_q", "SelfAttention_q"),
        ("joint_blocks.2.x_block.attn.qkv", "x_block.attn.qkv"),
        ("text_model.final_layer_norm", "final_layer_norm"),
        ("time_embed.0", "time_embed.0"),
        ("=cmd|' /C calc'!A0", "=cmd|' /C calc'!A0"),
        ("", ""),
    ],
)
def test_an_element_is_what_stands_behind_the_block(name, element):
    assert element_of(name) == element


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", ["blocks_1", "input_blocks_", "resnets_1_", "encoder_layers_", "a\n", "1_" * 9])
def test_an_endless_name_takes_no_endless_time(part):
    assert element_of(part * 50_000)


def test_a_layer_that_needs_the_model_is_told_without_it_and_known_with_it(tmp_path):
    model = {"unet": sd1_unet()}
    layers = {layer.key: layer for layer in KeyMap.from_modules(model)}
    place = layers["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"]
    plain = layers["unet.mid_block.attentions.0.proj_in"]
    vector = torch.linspace(-1, 1, place.shape[0])
    name = f"lora_unet_{place.key.removeprefix('unet.').replace('.', '_')}"
    path = write(tmp_path, [plain], {f"{name}.weight": vector, f"{name}.on_input": torch.tensor(False)})

    alone = analyse_blocks(path)
    assert alone.block_shares()["M00"] == 1
    assert any("1 of 2 layers" in note for note in alone.notes)

    keymap = KeyMap.from_modules(model)
    given = GivenModel(keymap, lambda wanted: {layer.key: layer.live() for layer in wanted})
    known = analyse_blocks(path, given)
    exact = np.linalg.norm(vector.double().numpy()[:, None] * place.live().double().numpy())
    assert known.cells["IN04", "attn1.to_k"].norm == pytest.approx(exact, rel=NORM_ERROR)
    assert known.notes == ()
    assert inspect_file(path, given).fit.matched == 2
    assert inspect_file(path, GivenModel(keymap)).block_norms().keys() == {"M00"}


def test_another_familys_model_is_told_and_the_file_analysed_alone():
    found = analyse_blocks(GOLDEN / "lora_A.safetensors", GivenModel(KeyMap.from_modules({"unet": sdxl_unet()})))
    assert "SDXL" in found.notes[0]
    assert found.shares == analyse_blocks(GOLDEN / "lora_A.safetensors").shares


def test_layers_outside_of_all_blocks_are_shown_as_other(tmp_path):
    layers = {layer.key: layer for layer in KeyMap.from_modules({"unet": sd1_unet()})}
    chosen = [layers["unet.time_embedding.linear_1"], *lierla(layers.values())[:1]]
    found = analyse_blocks(write(tmp_path, chosen, metadata={"ss_base_model_version": "sd_v1"}))
    assert found.blocks[-1] == OUTSIDE
    assert found.cells[OUTSIDE, "time_embed.0"].layers == 1


def test_sums_are_shares_of_one_whole():
    found = analyse_blocks(GOLDEN / "lora_D_c3lier.safetensors")
    for shares in (found.shares, found.block_shares(), found.element_shares(), found.kind_shares()):
        assert math.fsum(shares.values()) == pytest.approx(1)
    assert {"attn1", "attn2", "ff", "in_layers", "self_attn"} <= found.kind_shares().keys()


def test_csv_and_json_say_the_same():
    found = analyse_blocks(GOLDEN / "lora_A.safetensors")
    told = json.loads(json.dumps(found.to_dict()))
    lines = list(csv.DictReader(StringIO(found.to_csv())))
    assert len(lines) == len(told["cells"]) == len(found.cells)
    for line, cell in zip(lines, told["cells"], strict=True):
        assert (line["block"], line["element"]) == (cell["block"], cell["element"])
        assert float(line["share"]) == pytest.approx(cell["share"], rel=1e-5)
    assert [line["block"] for line in lines[:1]] == ["BASE"]


def test_the_command_writes_a_table_that_is_not_replaced_unasked(tmp_path, capsys):
    command = ["inspect", str(GOLDEN / "lora_A.safetensors"), "--csv", str(tmp_path / "a.csv")]
    assert main(command) == 0
    data = (tmp_path / "a.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbfblock,element,layers,norm,share\r\n")
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_what_is_no_lora_is_refused(tmp_path):
    with pytest.raises(FileError):
        analyse_blocks(tmp_path / "nowhere.safetensors")
    with pytest.raises(JobError, match=r"base\.safetensors has nothing to analyse"):
        analyse_blocks(GOLDEN / "base.safetensors")
    broken = partial(analyse_blocks, tmp_path / "a.safetensors")
    save_tensors(tmp_path / "a.safetensors", {"lora_unet_conv_in.lora_up.weight": torch.ones(4, 2)})
    with pytest.raises(PrefuseError, match="conv_in"):
        broken()
