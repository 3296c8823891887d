"""Plots of numbers, as SVG for pages in light and dark and as PNG."""

from __future__ import annotations

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image, ImageColor

from lib_lora.prompt.block_names import LISTS
from lib_lora.tools.inspect import inspect_file
from lib_lora.tools.plots.bars import MOST_TAGS, draw_changes, draw_tags
from lib_lora.tools.plots.file import draw_file
from lib_lora.tools.plots.heat import draw_heat
from lib_lora.tools.plots.style import COLOURS, INK, OTHER_COLOUR, WIDTH, width_of
from lib_lora.tools.plots.weights import draw_weights, weights_svg
from lib_lora.tools.plots.words import Words

GOLDEN = Path(__file__).parents[1] / "golden/sd1"
SVG = "{http://www.w3.org/2000/svg}"
PARTS = {"svg", "g", "title", "path", "text"}
PAGES = ("#ffffff", "#0b0f19", "#1f2937")
"""Grounds of gradio's pages."""
LEAST_CONTRAST = 3.0
"""WCAG 2.1, success criterion 1.4.11, of graphics."""
PIXEL = 0.11
"""Half of what coordinates are rounded to, twice, and a bit."""
SMALL_ENOUGH = 15_000
HOSTILE = (
    "<script>alert(1)</script>",
    "</text><image href=x onerror=alert(1)>",
    "]]><!-- --><![CDATA[",
    "&lt;&#60;&amp;",
    "\"'><svg/onload=alert(1)>",
    "$x_1$ $\\frac{1}{0}$",
    "$",
    "\\$ $ \\undefined{",
    "_hidden",
    "%s %(a)s {0} {",
    "\x00\x07\x1b[31m\ufffe\uffff",
    "\ud800 lone",
    "\u202eltr \u200b\u2066",
    "line\nbreak\ttab\u2028end",
    "初音ミク 双马尾 한국어",
    "🏳️‍🌈👩‍👩‍👧",
    "Z̴̡̢̛a̷lg̶o" + "\u0301" * 300,
    "x" * 5000,
    "",
    "   ",
)


def parsed(svg: str) -> ElementTree.Element:
    """The elements, of which there are none but shapes and texts without names or events."""
    root = ElementTree.fromstring(svg)  # noqa: S314 -- it is ours
    for element in root.iter():
        assert element.tag.removeprefix(SVG) in PARTS
        assert not [name for name in element.attrib if name in ("id", "href", "class") or name.startswith("on")]
    return root


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter(f"{SVG}text")]


def corners(path: ElementTree.Element) -> np.ndarray:
    """Points of a path, (n, 2)."""
    return np.array(re.findall(r"-?[\d.]+", path.attrib["d"].replace("h0", "")), float).reshape(-1, 2)


def bars(svg: str) -> dict[str, np.ndarray]:
    """What is told of a bar → (width, height)."""
    groups = parsed(svg).findall(f".//{SVG}g")
    return {group[0].text: np.ptp(corners(group[1]), axis=0) for group in groups}


def luminance(colour: str) -> float:
    """Source: WCAG 2.1, relative luminance."""
    parts = np.array(ImageColor.getrgb(colour)) / 255
    return float(np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))


def all_plots(word: str = "word") -> list:
    blocks = LISTS[26]
    return [
        draw_weights(blocks, [0.5] * 26, dict.fromkeys(blocks, 1 / 26)),
        draw_heat({("IN01", word): 0.25, ("M00", "ff"): 0.75}, ["IN01", "M00"], [word, "ff"]),
        draw_tags({word: 3, "other": 2}),
        draw_changes({"BASE": 1.0, word: 0.0}, word),
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_colour_is_told_apart_from_light_and_dark_pages(page):
    for colour in (*COLOURS.values(), OTHER_COLOUR):
        dark, light = sorted((luminance(colour), luminance(page)))
        assert (light + 0.05) / (dark + 0.05) >= LEAST_CONTRAST, colour


def test_whatever_is_no_datum_has_the_colour_of_the_pages_text():
    known = {"currentColor", "none", *COLOURS.values(), OTHER_COLOUR}
    for plot in all_plots():
        svg = plot.svg()
        assert set(re.findall(r'(?:fill|stroke)="([^"]*)"', svg)) <= known
        assert INK not in svg
        assert all(text.attrib["fill"] == "currentColor" for text in parsed(svg).iter(f"{SVG}text"))


@pytest.mark.parametrize("length", [12, 17, 20, 26])
def test_the_line_is_at_the_weights_and_the_bars_are_as_high_as_the_shares(length):
    blocks = LISTS[length]
    weights = [index / (length - 1) for index in range(length)]
    shares = {block: float(index) for index, block in enumerate(blocks)}
    svg = weights_svg(blocks, weights, shares)
    line, dots = (corners(path) for path in parsed(svg).findall(f"{SVG}path")[-2:])
    np.testing.assert_allclose(line, dots, atol=PIXEL)
    np.testing.assert_allclose(line[:, 1], np.interp(weights, [0, 1], line[[0, -1], 1]), atol=PIXEL)
    heights = np.array([size[1] for size in bars(svg).values()])
    np.testing.assert_allclose(heights, np.linspace(0, heights[-1], length), atol=PIXEL)
    assert heights[-1] == pytest.approx(line[0, 1] - line[-1, 1], abs=PIXEL)
    assert set(blocks) <= set(texts(svg))


@pytest.mark.parametrize("weights", [[0.0] * 26, [-2.0, *[0.3] * 24, 7.5], [100.0, *[-100.0] * 25], [1.26] * 26])
def test_the_line_stays_within_the_picture_whatever_the_weights(weights):
    line = corners(parsed(weights_svg(LISTS[26], weights)).findall(f"{SVG}path")[-1])
    assert line.min() > 0
    assert line[:, 0].max() < WIDTH
    assert line[:, 1].max() < 250


def test_a_slider_gives_the_same_picture_as_a_new_one_and_a_small_one():
    blocks, shares = LISTS[26], {"IN05": 0.4, "OUT03": 0.6}
    for moved in (0.0, 0.5, 1.0, 1.6, 0.5):
        weights = [1.0, moved, *[0.25] * 24]
        svg = weights_svg(blocks, weights, shares)
        assert svg == draw_weights(blocks, weights, shares).svg()
        assert len(svg) <= SMALL_ENOUGH


@pytest.mark.parametrize("length", [12, 17, 20, 26])
def test_names_of_blocks_do_not_meet(length):
    svg = parsed(weights_svg(LISTS[length], [1.0] * length))
    names = [text for text in svg.iter(f"{SVG}text") if text.text in LISTS[length]]
    if "transform" in names[0].attrib:
        places = [float(re.search(r"translate\((\S+)", name.attrib["transform"])[1]) for name in names]
        needed = [float(name.attrib["font-size"]) for name in names]
    else:
        places = [float(name.attrib["x"]) for name in names]
        needed = [width_of(name.text, float(name.attrib["font-size"])) for name in names]
    assert all(np.diff(places) >= np.minimum(needed[1:], needed[:-1]))


@pytest.mark.parametrize("word", HOSTILE)
def test_texts_of_files_are_texts_and_nothing_else(word):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for plot in all_plots(word):
            parsed(plot.svg())
            assert plot.png().startswith(b"\x89PNG")


def test_a_formula_stands_as_it_was_written():
    assert "$x_1$ <b>" in texts(draw_tags({"$x_1$ <b>": 1}).svg())


def test_letters_of_chinese_reach_the_page():
    assert "初音ミク" in texts(draw_tags({"初音ミク": 1}).svg())


def test_settings_of_the_process_neither_change_a_picture_nor_are_changed():
    before = [plot.svg() for plot in all_plots()]
    weird = {"svg.fonttype": "path", "axes.facecolor": "black", "text.color": "red", "axes.grid": True}
    with mpl.rc_context(weird):
        assert [plot.svg() for plot in all_plots()] == before
        assert {name: mpl.rcParams[name] for name in weird} == weird
    with mpl.rc_context({"text.usetex": True}):
        assert [texts(plot.svg()) for plot in all_plots()] == [texts(svg) for svg in before]


def test_several_threads_draw_at_once():
    jobs = [[index / 12, *[0.5] * 25] for index in range(12)]
    alone = [draw_weights(LISTS[26], weights, {"M00": 1.0}).svg() for weights in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda weights: weights_svg(LISTS[26], weights, {"M00": 1.0}), jobs)) == alone
        assert list(pool.map(lambda weights: draw_weights(LISTS[26], weights, {"M00": 1.0}).svg(), jobs)) == alone


def test_every_text_of_a_plot_can_be_another_languages():
    words = Words(**dict.fromkeys((field.name for field in fields(Words)), "权重 {{}}"))
    found = inspect_file(GOLDEN / "lora_A.safetensors")
    plots = [
        draw_weights(LISTS[12], [1.0] * 12, {"M00": 1.0}, words=words),
        draw_heat({("IN01", "ff"): 1.0}, ["IN01"], ["ff"], words=words),
        draw_tags({"tag": 1}, words=words),
        draw_file(found, words),
    ]
    for plot in plots:
        svg = plot.svg()
        assert "权重" in parsed(svg).attrib["aria-label"]
        assert not [text for text in texts(svg) if re.search("[a-z]{4}", text) and "lora_A" not in text]


def test_a_field_is_as_strong_as_the_root_of_its_share():
    svg = draw_heat({("IN01", "ff"): 0.25, ("M00", "proj_in"): 1.0}, ["IN01", "M00"], ["ff", "proj_in"]).svg()
    fields = {group[0].text: group[1] for group in parsed(svg).iter(f"{SVG}g")}
    assert float(fields["IN01 ff: 25.00%"].attrib["fill-opacity"]) == 0.5
    assert "fill-opacity" not in fields["M00 proj_in: 100.00%"].attrib
    left, right = (corners(field).mean(axis=0) for field in fields.values())
    assert (left < right).all()
    assert "100%" in texts(svg)


def test_a_lora_without_any_change_is_drawn():
    assert draw_heat({("IN01", "ff"): 0.0}, ["IN01"], ["ff"]).svg()
    assert draw_changes({"IN01": 0.0}, "change").svg()
    assert weights_svg(["IN01"], [1.0], {"IN01": 0.0})


def test_tags_stand_by_their_number_the_most_first():
    counts = {f"tag {number}": number for number in range(1, 61)}
    svg = draw_tags(counts).svg()
    widths = {name: size[0] for name, size in bars(svg).items()}
    assert list(widths) == [f"tag {number}: {number}" for number in range(60, 60 - MOST_TAGS, -1)]
    np.testing.assert_allclose(list(widths.values()), np.arange(60, 30, -1) / 60 * widths["tag 60: 60"], atol=PIXEL)


def test_a_png_is_opaque_with_bars_in_the_right_proportion():
    with Image.open(BytesIO(draw_changes({"BASE": 10.0, "IN01": 2.5}, "change").png())) as image:
        assert image.mode == "RGB"
        pixels = np.asarray(image).astype(int)
    rows = [(pixels == ImageColor.getrgb(COLOURS[kind])).all(axis=2).any(axis=1).sum() for kind in ("BASE", "IN")]
    assert rows[1] / rows[0] == pytest.approx(0.25, abs=0.02)
    assert (pixels[[0, -1]] == 255).all()
