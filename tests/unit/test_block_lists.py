"""Block weights as a form shows them: lists, names, letters, and the shortest text that means the same."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_lora.errors import TagError
from lib_lora.prompt.block_names import LISTS
from lib_lora.prompt.block_weights import SHIPPED_WEIGHTS, BlockRequest, Presets
from lib_lora.prompt.tags import parse_prompt
from lib_lora.tools.block_lists import WHOLE, BlockList, shortest_text, tag_of

SHIPPED = Presets()
WEIGHTS = st.sampled_from(["0", "1", "0.5", "-0.25", "1.75"])
ROUNDING = 5e-5
"""Of a curve's numbers, which have 4 decimals in a list."""


def resolved(text: str, length: int) -> dict[str, float]:
    """What a tag makes of it in a model that has all blocks of the list."""
    return dict(BlockRequest(weights=text).resolve(SHIPPED, LISTS[WHOLE[length]]).blocks)


@pytest.mark.parametrize("length", LISTS)
def test_a_list_gives_each_block_its_number(length: int) -> None:
    text = ",".join(f"{index / 100:g}" for index in range(length))
    found = BlockList.read(text, SHIPPED, 17)
    assert found.text == text
    assert dict(zip(found.items, found.weights, strict=True)) == resolved(text, length)


@pytest.mark.parametrize("length", [17, 26])
@pytest.mark.parametrize("name", [name for name in SHIPPED_WEIGHTS if name != "FLUXALL"])
def test_a_preset_keeps_its_meaning_in_a_longer_list(name: str, length: int) -> None:
    found = BlockList.read(name, SHIPPED, length)
    assert len(found.items) == length
    meant = resolved(name, 26)
    assert found.weights == [meant.get(block, 0.0) for block in found.items]


def test_a_preset_whose_blocks_the_list_has_not_stays_as_long_as_it_is() -> None:
    assert len(BlockList.read("ALL", SHIPPED, 12).items) == 17
    assert len(BlockList.read("NONE", SHIPPED, 61).items) == 17


@pytest.mark.parametrize("length", LISTS)
@pytest.mark.parametrize("name", ["sine", "cosine", "linear", "reverse_linear", "zeros", "linear+0.25"])
def test_a_curve_is_what_a_tag_makes_of_it(name: str, length: int) -> None:
    found = BlockList.read(name, SHIPPED, length)
    meant = resolved(name, length)
    for block, weight in zip(found.items, found.weights, strict=True):
        assert weight == pytest.approx(meant.get(block, 1.0), abs=ROUNDING)


def test_letters_stay_and_are_shown_as_numbers() -> None:
    found = BlockList.read(",".join(["R", "U", "X", "X-0.25", *["1"] * 13]), SHIPPED, 17)
    assert found.weights[:4] == [0.5, 0.5, 1.0, 0.75]
    assert found.drawn == "RUX"
    assert found.inverted().text.startswith("R,U,X,X-0.25,0,0")


@pytest.mark.parametrize("text", ["", "  ", "1,2,3", "nosuch", "1,,1", "nan," + ",".join("1" * 16), "sine+x"])
def test_what_can_not_be_read_is_refused(text: str) -> None:
    with pytest.raises(TagError):
        BlockList.read(text, SHIPPED, 17)


def test_another_length_keeps_the_blocks_and_gives_others_nothing() -> None:
    short = BlockList.read(",".join(["1", "0.5", *["0.25"] * 15]), SHIPPED, 17).resized(26)
    assert short.items["IN01"] == "0.5"
    assert short.items["IN00"] == "0"
    assert short.resized(17).items["OUT11"] == "0.25"


def test_what_is_the_same_everywhere_stays_so_in_another_length() -> None:
    assert {*BlockList.of(0.5, 12).resized(61).items.values()} == {"0.5"}


@given(st.sampled_from([12, 17, 20, 26]), st.data())
def test_the_shortest_text_means_the_same(length: int, data: st.DataObject) -> None:
    items = data.draw(st.lists(WEIGHTS, min_size=length, max_size=length))
    shown = BlockList.read(",".join(items), SHIPPED, length)
    text = shortest_text(shown, SHIPPED)
    meant = resolved(text, length) if text else dict.fromkeys(LISTS[WHOLE[length]], 1.0)
    assert len(text) <= len(shown.text)
    weights = dict(zip(shown.items, shown.weights, strict=True))
    assert all(meant.get(block, 0.0) == weights.get(block, 0.0) for block in LISTS[WHOLE[length]])


def test_a_name_is_the_text_only_if_blocks_outside_of_the_list_are_meant_too() -> None:
    all_of_17 = BlockList.of(1.0, 17)
    assert shortest_text(all_of_17, SHIPPED, LISTS[26]) == shortest_text(all_of_17, SHIPPED) == "ALL"
    assert shortest_text(all_of_17, SHIPPED, LISTS[17]) == ""
    linear = BlockList.read("linear", SHIPPED, 17)
    assert shortest_text(linear, SHIPPED, LISTS[17]) == "linear"
    assert shortest_text(linear, SHIPPED, LISTS[26]) == linear.text  # IN00 and others are in the curve


def test_the_name_that_was_chosen_comes_before_others_of_the_same_meaning() -> None:
    presets = Presets({**SHIPPED_WEIGHTS, "mine": SHIPPED_WEIGHTS["INS"]})
    shown = BlockList.read("mine", presets, 26)
    assert shortest_text(shown, presets, LISTS[26]) == "INS"
    assert shortest_text(shown, presets, LISTS[26], "mine") == "mine"


def test_a_name_that_a_tag_can_not_hold_is_written_out() -> None:
    presets = Presets({"a=b": ",".join(["0.3"] * 17)})
    shown = BlockList.read("a=b", presets, 17)
    assert shortest_text(shown, presets, None, "a=b") == ",".join(["0.3"] * 17)


def test_a_tag_reads_back_as_what_it_was_made_of() -> None:
    request = parse_prompt(tag_of("some: name (v1)", 0.85, "INS")).requests[0]
    assert request.name == "some_ name (v1)"
    assert (request.te, request.unet) == (0.85, 0.85)
    assert request.blocks is not None
    assert request.blocks.weights == "INS"
    assert tag_of("plain", 1, "") == "<lora:plain:1>"


@pytest.mark.parametrize(("strength", "weights"), [(math.nan, ""), (math.inf, ""), (1.0, "a:b"), (1.0, "a>b")])
def test_a_tag_is_not_made_of_what_it_can_not_hold(strength: float, weights: str) -> None:
    with pytest.raises(TagError):
        tag_of("plain", strength, weights)
