"""How a picture was made, in the WebUI's words."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_lora.hosts.standalone.infotext import Infotext, parse_infotext, png_bytes, quote, unquote

PARAMETERS = {
    "Steps": "20",
    "Sampler": "Euler a",
    "CFG scale": "7",
    "Seed": "1",
    "Size": "512x512",
    "Model hash": "0123456789",
    "Model": "model",
    "Lora hashes": "ink: 0123456789ab, stripes: ba9876543210",
    "Version": "Prefuse 0.1.0",
}
# As the WebUI itself wrote it for these parameters.
WEBUI_TEXT = (
    "a red circle <lora:ink:0.8> <lora:stripes:0.5>\n"
    "Negative prompt: blurry, dark\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 0123456789, Model: model, "
    'Lora hashes: "ink: 0123456789ab, stripes: ba9876543210", Version: Prefuse 0.1.0'
)
PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=30)


def test_the_text_is_the_webuis():
    info = Infotext("a red circle <lora:ink:0.8> <lora:stripes:0.5>", "blurry, dark", PARAMETERS)
    assert str(info) == WEBUI_TEXT


def test_the_webuis_text_is_read_back():
    info = parse_infotext(WEBUI_TEXT)
    assert info.prompt == "a red circle <lora:ink:0.8> <lora:stripes:0.5>"
    assert info.negative == "blurry, dark"
    assert info.parameters == PARAMETERS


def test_without_a_negative_prompt_there_is_no_line_for_it():
    text = str(Infotext("a", "", PARAMETERS))
    assert text.startswith("a\nSteps: 20, ")
    assert parse_infotext(text).negative == ""


def test_prompts_of_several_lines_are_read_back():
    info = Infotext("first\nsecond: line, here", "no\nnever", PARAMETERS)
    assert parse_infotext(str(info)) == info


def test_text_without_parameters_is_all_prompt():
    assert parse_infotext("a red circle, on blue") == Infotext("a red circle, on blue", "", {})


def test_two_parameters_in_a_prompts_last_line_are_no_parameters():
    assert parse_infotext("a cat\nstyle: ink, mood: calm").prompt == "a cat\nstyle: ink, mood: calm"


@pytest.mark.parametrize("value", ["a, b", "a: b", "line\nbreak", 'say "x": y', "back\\slash: z", "ü: ö"])
def test_values_that_look_like_the_end_of_a_parameter_are_quoted(value):
    assert quote(value).startswith('"')
    assert unquote(quote(value)) == value


@pytest.mark.parametrize("value", ["20", "Euler a", "512x512", 'a "b" c', ""])
def test_other_values_are_not_quoted(value):
    assert quote(value) == value


@pytest.mark.parametrize("value", ['"', '"broken\\"', "plain", '"a" and "b"'])
def test_what_is_no_quoted_value_is_left_as_it_is(value):
    assert unquote(value) == value


@given(st.dictionaries(st.sampled_from(list(PARAMETERS)), PLAIN, min_size=3))
def test_any_parameters_are_read_back(values):
    kept = {key: value for key, value in values.items() if value == value.strip() and '"' not in value}
    if len(kept) >= 3:
        assert parse_infotext(str(Infotext("a prompt", "", kept))).parameters == kept


def test_the_png_carries_the_text_where_the_webui_looks_for_it():
    info = Infotext("prompt", "", PARAMETERS)
    with Image.open(io.BytesIO(png_bytes(Image.new("RGB", (8, 8), "red"), info))) as image:
        assert image.text == {"parameters": str(info)}
        assert image.getpixel((3, 3)) == (255, 0, 0)


def test_the_png_carries_letters_beyond_latin():
    info = Infotext("кошка 猫 <lora:墨:1>", "", PARAMETERS)
    with Image.open(io.BytesIO(png_bytes(Image.new("RGB", (8, 8)), info))) as image:
        assert parse_infotext(image.text["parameters"]) == info


def test_a_png_without_text_has_no_text_chunk():
    assert b"parameters" not in png_bytes(Image.new("RGB", (8, 8)))
