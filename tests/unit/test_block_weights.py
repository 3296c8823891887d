"""Block weights: what lists, presets, curves, elements and thirds come to, by the tables of LoRA Block Weight."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora.errors import TagError
from lib_lora.presets import PresetFiles
from lib_lora.prompt.block_weights import BlockRequest, Presets, read_list
from lib_lora.prompt.preset_texts import ELEMENTS, WEIGHTS
from lib_lora.prompt.tags import parse_prompt

INDEX = json.loads((Path(__file__).parents[1] / "golden/fullsize/block_index.json").read_text())
NAMES = ["M00" if name == "MID" else name for name in INDEX["lbw_names"]]
SD1 = frozenset(NAMES)
SDXL = SD1 - {"IN09", "IN10", "IN11", "OUT09", "OUT10", "OUT11"}
FLUX = ("IN", *(f"D{number:02d}" for number in range(19)), *(f"S{number:02d}" for number in range(38)), "OUT")
LAYER = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
PRESETS = {
    "NONE": (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "ALL": (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    "INS": (1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "IND": (1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "INALL": (1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "MIDD": (1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0),
    "OUTD": (1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0),
    "OUTS": (1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    "OUTALL": (1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    "ALL0.5": (0.5,) * 17,
}
FORMULA_ERROR = 1e-12


def weights(arguments: str, blocks=SD1, presets: Presets | None = None, seed: int = 0):
    (request,) = parse_prompt(f"<lora:a:1:{arguments}>", seed).requests
    return request.blocks.resolve(presets or Presets(), blocks)


def factors(arguments: str, blocks=SD1, **options) -> dict[str, float]:
    found = weights(arguments, blocks, **options)
    return {block: found.of(block, "x") for block in NAMES if block in blocks}


@pytest.mark.parametrize("length", [12, 17, 20, 26])
def test_each_number_of_a_list_weighs_the_block_it_weighs_in_kohyas_scripts(length):
    named = [NAMES[index] for index in INDEX["lbw_target_idx"][str(length)]]
    numbers = [(index + 1) / 32 for index in range(length)]
    found = factors(f"lbw={','.join(map(str, numbers))}")
    assert found == dict.fromkeys(NAMES, 0.0) | dict(zip(named, numbers, strict=True))


def test_a_list_for_flux_has_a_number_for_both_encoders_and_each_block():
    found = weights(f"lbw={','.join(str(index) for index in range(61))}", {"BASE", *FLUX})
    assert [found.of(block, "x") for block in FLUX] == list(range(2, 61))
    assert found.of("BASE", "transformer_text_model_encoder_layers_0_mlp_fc1") == 0
    assert found.of("BASE", "transformer_encoder_block_0_layer_0_SelfAttention_q") == 1


@pytest.mark.parametrize(("name", "numbers"), PRESETS.items())
def test_the_presets_of_the_extension_are_there(name, numbers):
    named = [NAMES[index] for index in INDEX["lbw_target_idx"]["17"]]
    assert factors(f"lbw={name}") == dict.fromkeys(NAMES, 0) | dict(zip(named, numbers, strict=True))
    assert weights(f"lbw={name}").text == f"lbw={','.join(map(str, numbers))}"


@pytest.mark.parametrize(
    ("curve", "formula"),
    [
        ("sine", lambda t: math.sin(math.pi / 2 * t)),
        ("cosine", lambda t: math.sin(math.pi / 2 * (1 - t))),
        ("linear", lambda t: t),
        ("reverse_linear", lambda t: 1 - t),
        ("zeros", lambda t: 0.0),
        ("linear+0.25", lambda t: t + 0.25),
        ("zeros+-1", lambda t: -1.0),
    ],
)
@pytest.mark.parametrize(("blocks", "count"), [(SD1, 25), (SDXL, 19)])
def test_a_curve_runs_over_the_models_blocks_and_leaves_text_encoders(curve, formula, blocks, count):
    found = factors(f"lbw={curve}", blocks)
    assert found.pop("BASE") == 1
    expected = [formula(index / (count - 1)) for index in range(count)]
    assert list(found.values()) == pytest.approx(expected, abs=FORMULA_ERROR)


def test_what_is_in_no_block_keeps_its_weight():
    for arguments in ("lbw=NONE", "lbw=zeros", "in=0:mid=0:out=0"):
        assert weights(arguments).of("", "time_embed_0") == 1


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("in=0.5", {f"IN{number:02d}": 0.5 for number in range(12)}),
        ("mid=0", {"M00": 0.0}),
        ("out=-1:in=2", {f"OUT{number:02d}": -1.0 for number in range(12)} | {f"IN{n:02d}": 2.0 for n in range(12)}),
    ],
)
def test_thirds_weigh_their_blocks_and_nothing_else(arguments, changed):
    assert factors(arguments) == dict.fromkeys(NAMES, 1.0) | changed


def test_a_third_multiplies_the_list():
    found = factors("lbw=ALL0.5:out=0.5:mid=0")
    assert (found["BASE"], found["IN01"], found["M00"], found["OUT03"], found["OUT00"]) == (0.5, 0.5, 0, 0.25, 0)


def test_random_numbers_are_in_their_ranges_and_the_seed_repeats_them():
    draws = [weights(f"lbw={'R,' * 13}{'U,' * 12}U", seed=seed) for seed in range(40)]
    numbers = [[found.of(block, "x") for block in NAMES] for found in draws]
    uniform, wide = ([one for row in numbers for one in row[part]] for part in (slice(13), slice(13, 26)))
    assert 0 <= min(uniform) < 0.1
    assert 0.9 < max(uniform) <= 1
    assert -0.5 <= min(wide) < -0.4
    assert 1.4 < max(wide) <= 1.5
    assert all(round(one, 3) == one for one in (*uniform, *wide))
    assert numbers[3] == [weights(f"lbw={'R,' * 13}{'U,' * 12}U", seed=3).of(block, "x") for block in NAMES]
    assert len({tuple(row) for row in numbers}) == 40


def test_what_was_drawn_or_looked_up_can_be_written_as_a_tag_that_needs_neither():
    for arguments in (f"lbw={'R,' * 16}U", "lbw=MIDD:lbwe=ATTNDEEPOFF:out=0.3", f"lbw={'X-0.2,' * 11}1:x=0.7"):
        found = weights(arguments, seed=5)
        again = weights(found.text, seed=6, presets=Presets({}, {}))
        assert found.says_more
        assert not again.says_more
        assert again == found._replace(says_more=False)


def test_plain_numbers_curves_and_rules_say_no_more_than_the_tag():
    for arguments in ("lbw=" + "1," * 16 + "0", "lbw=sine+0.1", "in=0.5", "lbwe=IN05-OUT05;attn;0"):
        found = weights(arguments)
        assert found.text == arguments
        assert not found.says_more


def test_x_is_what_the_tag_says_and_more_or_less():
    assert read_list("X,X+0.5,X-0.25, X ," + "0," * 7 + "0", 0.75)[:4] == [0.75, 1.25, 0.5, 0.75]


# Rules, block, layer, and the factor: the block's is 1. Expected values by the extension's rules.
RULES = [
    ("IN04;attn1;0.3", "IN04", LAYER, 0.3),
    ("IN05;attn1;0.3", "IN04", LAYER, 1),
    ("IN05-OUT05;attn;0", "IN04", LAYER, 1),
    ("IN03-IN05;attn;0", "IN04", LAYER, 0),
    ("IN05-IN03;attn;0", "IN04", LAYER, 0),
    ("BASE IN04;attn2 to_q;0", "IN04", LAYER, 0),
    ("NOT IN04;;0", "IN04", LAYER, 1),
    ("NOT IN04;;0", "M00", "middle_block_1_proj_in", 0),
    ("NOT IN03-IN05 OUT01;;0", "IN04", LAYER, 1),
    (";NOT attn1;0", "IN04", LAYER, 1),
    (";NOT attn2;0.2", "IN04", LAYER, 0.2),
    (";;0.1,IN04;attn1;0.2", "IN04", LAYER, 0.2),
    ("IN04;attn1;0.2,;;0.1", "IN04", LAYER, 0.1),
    ("IN04;attn1.to_q;0.9", "IN04", LAYER, 0.9),
    ("IN04;attn1.to_k;0.9", "IN04", LAYER, 1),
    ("BASE;;0", "BASE", "transformer_text_model_encoder_layers_0_mlp_fc1", 0),
    (";transformer;0", "BASE", "transformer_text_model_encoder_layers_0_mlp_fc1", 0),
    (";time_embed;0", "", "time_embed_0", 0),
    (" IN04  ; attn1 ; 0.5 ", "IN04", LAYER, 0.5),
    ("S03;linear1;0", "S03", "single_blocks_3_linear1", 0),
    ("D17-S01;;0", "D18", "double_blocks_18_img_mlp_0", 0),
]


@pytest.mark.parametrize(("rules", "block", "layer", "factor"), RULES)
def test_the_last_rule_that_fits_a_layer_replaces_its_blocks_weight(rules, block, layer, factor):
    assert BlockRequest(elements=rules).resolve(Presets(), SD1).of(block, layer) == factor
    assert BlockRequest("ALL", rules).resolve(Presets(), SD1).of("IN01", "x_proj_in") in {1, 0, 0.1, 0.2}


@pytest.mark.parametrize(
    ("arguments", "blocks", "said"),
    [
        ("lbw=MID", SD1, "lbw names no preset 'MID'; there are MIDD"),
        ("lbw=sine+x", SD1, "added to the curve of lbw is 'x'"),
        ("lbw=0.5", SD1, "lbw names no preset '0.5'; there are ALL0.5"),
        ("lbwe=ATTN", SD1, "lbwe names no preset 'ATTN'; there are ATTNDEEPON"),
        ("lbw=MIDD", {"BASE", *FLUX}, "no block of this model, for its blocks are IN to OUT"),
        ("lbw=FLUXALL", SD1, "no block of this model, for its blocks are IN00 to OUT11"),
        ("lbw=sine", {"BASE"}, "no block of this model, for its blocks have no names"),
        ("in=0", {"BASE", *FLUX}, "no block of this model"),
    ],
)
def test_what_means_nothing_in_this_model_is_refused_with_a_sentence(arguments, blocks, said):
    with pytest.raises(TagError, match=said.replace("+", r"\+")):
        weights(arguments, blocks)


def test_a_preset_file_is_read_as_the_extension_reads_it():
    ones, text = ",".join("1" * 17), ",".join("R" * 12)
    lines = (
        f"MY:{ones}",
        f"# NOT:{ones}",
        f"NOR:{ones} # why",
        "SHORT:1,2",
        "no colon",
        f"絵:{text}:rest",
        f"MY:{text}",
    )
    assert WEIGHTS.presets("\r\n".join(lines)) == {"MY": text, "絵": text}


def test_element_presets_are_separated_by_empty_lines():
    text = "A:IN05:attn:1,IN06::0\nOUT01:proj:0.5\n\n B :::1\r\n  \r\nwords\n\nC:M00:ff:0"
    presets = ELEMENTS.presets(text)
    assert list(presets) == ["A", "B", "C"]
    rules = BlockRequest(elements="A").resolve(Presets({}, presets), SD1).rules
    assert [rule.text for rule in rules] == ["IN05;attn;1", "IN06;;0", "OUT01;proj;0.5"]


def test_files_are_read_again_when_they_change_and_the_first_folder_wins(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    files = PresetFiles([first, tmp_path / "missing", second])
    assert files.read() == Presets()
    ones, zeros = ",".join("1" * 17), ",".join("0" * 17)
    (second / "lbwpresets.txt").write_text(f"MY:{ones}\nMIDD:{ones}", encoding="utf-8-sig")
    (second / "elempresets.txt").write_text("OWN:IN05::1")
    assert (files.read().weights["MY"], files.read().weights["MIDD"], files.read().weights["IND"]) == (
        *(ones, ones),
        Presets().weights["IND"],
    )
    assert files.read().elements["OWN"] == "IN05::1"
    (first / "lbwpresets.txt").write_text(f"MY:{zeros}")
    assert (files.read().weights["MY"], files.read().weights["MIDD"]) == (zeros, ones)
    (first / "lbwpresets.txt").unlink()
    assert files.read().weights["MY"] == ones


def test_a_preset_file_that_can_not_be_read_is_told_and_stops_nothing(tmp_path):
    (tmp_path / "lbwpresets.txt").write_bytes(b"MY:1\xff\xfe")
    (tmp_path / "elempresets.txt").mkdir()
    files = PresetFiles([tmp_path])
    assert files.read() == Presets()
    assert files.notes == ("lbwpresets.txt is not a text in UTF-8 (byte 4); its presets are not known here",)


PIECES = ["R", "U", "X", "X+", "1", "0.5", ",", ",", "1," * 16, "1," * 11, "MIDD", "sine", "+", "NOT ", "IN05", "-"]
PIECES += ["OUT05", ":", ";", ";attn;", "0", "nan", "é", "\n", " ", "DEEP", "ATTNDEEPON", "9" * 400]
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=10).map("".join), st.text(max_size=20))


@settings(max_examples=3000, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([SD1, SDXL, frozenset({"BASE", *FLUX}), frozenset()]))
def test_any_text_gives_finite_factors_or_a_sentence(lists, rules, blocks):
    presets = Presets({"MIDD": lists, "sine": rules}, {"ATTNDEEPON": rules})
    try:
        found = BlockRequest(lists, rules).resolve(presets, blocks)
        numbers = [found.of(block, LAYER) for block in blocks]
    except TagError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 400
    else:
        assert all(math.isfinite(number) for number in numbers)
