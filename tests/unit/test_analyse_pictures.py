"""What each block does to a picture, with a painter in place of a model."""

from __future__ import annotations

import csv
import json
import re
from io import StringIO

import numpy as np
import pytest
from PIL import Image

from lib_lora.errors import JobError
from lib_lora.prompt.block_names import LISTS
from lib_lora.prompt.tags import parse_prompt
from lib_lora.tools.analyse_pictures import analyse_pictures, compare_pair
from lib_lora.tools.grid import GAP, ROW_LABEL_WIDTH, in_cell

PROMPT = "a cat <lora:other:0.5> <lora:style:0.8:lbw=OUTALL:start=2:in=0.5> in a hat"
SIZE = (12, 8)
BLOCKS = LISTS[17]
PRESENT = ("BASE", "IN04", "M00", "OUT11")
AMOUNTS = {"BASE": 1.0, "IN04": 2.0, "M00": -3.0, "OUT11": 40.0}
"""What each block of the painter's LoRA adds to its own column of pixels."""


class Painter:
    """Paints 100, and in each block's own column its weight times its amount more."""

    def __init__(self, count: int = 0) -> None:
        self.prompts: list[str] = []
        self.count = count

    def __call__(self, prompt: str):
        self.prompts.append(prompt)
        pixels = np.full((SIZE[1], SIZE[0], 3), 100.0)
        if found := re.search(r"<lora:style:[^>]*lbw=([\d.,]+)[^>]*>", prompt):
            weights = dict(zip(BLOCKS, map(float, found[1].split(",")), strict=True))
            for column, (block, amount) in enumerate(AMOUNTS.items()):
                pixels[:, column, 0] += weights[block] * amount
        image = Image.fromarray(pixels.astype(np.uint8))
        return [image] * self.count if self.count else image


def analysed(painter: Painter, **options):
    return analyse_pictures(painter, PROMPT, **{"tag": 2, "length": 17, "present": PRESENT} | options)


def expected_rms(amounts: list[float]) -> float:
    """Of columns of one colour, in numpy's float64."""
    difference = np.zeros((SIZE[1], SIZE[0], 3))
    difference[:, : len(amounts), 0] = amounts
    return float(np.sqrt(np.mean(difference**2)))


@pytest.mark.parametrize("mode", ["only", "without"])
def test_a_blocks_number_is_the_root_mean_square_of_what_it_changes(mode):
    found = analysed(Painter(), mode=mode)
    assert [change.block for change in found.changes] == list(BLOCKS)
    for change in found.changes:
        assert change.drawn == (change.block in PRESENT)
        assert change.rms == pytest.approx(expected_rms([AMOUNTS.get(change.block, 0.0)]))
        assert change.differing == pytest.approx((1 / SIZE[0]) if change.drawn else 0)
    assert found.whole.rms == pytest.approx(expected_rms(list(AMOUNTS.values())))
    assert found.whole.differing == pytest.approx(4 / SIZE[0])


def test_each_block_of_the_lora_is_drawn_once_and_the_others_not():
    painter = Painter()
    analysed(painter)
    assert len(painter.prompts) == len(set(painter.prompts)) == 2 + len(PRESENT)


def test_prompts_differ_in_the_weights_of_one_tag_only():
    painter = Painter()
    analysed(painter)
    assert painter.prompts[0] == "a cat <lora:other:0.5>  in a hat"
    ones = ",".join("1" * 17)
    assert painter.prompts[1] == f"a cat <lora:other:0.5> <lora:style:0.8:start=2:lbw={ones}> in a hat"
    for prompt, block in zip(painter.prompts[2:], PRESENT, strict=True):
        other, style = parse_prompt(prompt).requests
        assert (other.name, style.name, style.te) == ("other", "style", 0.8)
        weights = style.blocks.weights.split(",")
        assert [name for name, weight in zip(BLOCKS, weights, strict=True) if weight == "1"] == [block]


def test_leaving_out_is_the_reverse():
    painter = Painter()
    analysed(painter, mode="without")
    weights = parse_prompt(painter.prompts[-1]).requests[1].blocks.weights.split(",")
    assert [name for name, weight in zip(BLOCKS, weights, strict=True) if weight == "0"] == ["OUT11"]


def test_differences_are_as_bright_as_the_largest_of_all_allows():
    found = analysed(Painter())
    assert found.brighter == pytest.approx(255 / 40)
    bright = {change.block: np.asarray(change.difference) for change in found.changes}
    assert bright["OUT11"][0, 3] == 255
    assert bright["M00"][0, 2] == int(3 * 255 / 40)
    assert not bright["IN01"].any()
    assert not np.delete(bright["OUT11"], 3, axis=1).any()


def test_several_pictures_of_a_prompt_count_together():
    one, three = analysed(Painter()), analysed(Painter(count=3))
    assert [change.rms for change in one.changes] == pytest.approx([change.rms for change in three.changes])


def test_progress_is_told_before_each_picture_and_can_stop_the_job():
    told = []
    analysed(Painter(), progress=lambda *step: told.append(step))
    assert told == [(index, 6, name) for index, name in enumerate(["no LoRA", "whole", *PRESENT])] + [(6, 6, "")]

    class StopError(Exception):
        pass

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise StopError

    painter = Painter()
    with pytest.raises(StopError):
        analysed(painter, progress=stop)
    assert len(painter.prompts) == 2


def test_csv_and_json_hold_the_numbers():
    found = analysed(Painter())
    lines = list(csv.DictReader(StringIO(found.to_csv())))
    assert [line["block"] for line in lines] == ["whole", *BLOCKS]
    assert float(lines[-1]["rms"]) == pytest.approx(expected_rms([40.0]), rel=1e-5)
    assert json.loads(json.dumps(found.to_dict()))["changes"][-1]["block"] == "OUT11"


def test_the_grid_shows_every_picture_beside_its_difference():
    found = analysed(Painter())
    sheet = np.asarray(found.grid(48))
    width = ROW_LABEL_WIDTH + 2 * (48 + GAP)
    assert sheet.shape[1] == 3 * width  # 19 rows in columns of 7
    # OUT11 is the last: row 4 of the third column; its picture is 140 in the fourth of 12 columns of pixels.
    last = sheet[-(48 + GAP) * 3 : -(48 + GAP) * 2, 2 * width + ROW_LABEL_WIDTH :]
    assert last[24, 4 * 3 + 2].tolist() == [140, 100, 100]
    assert last[24, 48 + GAP + 4 * 3 + 2].tolist() == [255, 255, 255]
    assert last[24, 48 + GAP + 4 * 8].tolist() == [0, 0, 0]


def test_two_pictures_are_compared_by_the_same_numbers():
    before, after = (np.full((4, 6, 3), 90, np.uint8) for _ in range(2))
    after[1, 2] = (90, 110, 85)
    change, brighter = compare_pair("b", Image.fromarray(before), Image.fromarray(after))
    difference = after.astype(float) - before
    assert change.rms == pytest.approx(np.sqrt(np.mean(difference**2)))
    assert change.differing == pytest.approx(1 / 24)
    assert brighter == pytest.approx(255 / 20)
    assert np.asarray(change.difference)[1, 2] == 255
    with pytest.raises(JobError, match="differ in size"):
        compare_pair("b", Image.new("RGB", (2, 2)), Image.new("RGB", (2, 3)))


@pytest.mark.parametrize("size", [(300, 100), (10, 40), (1, 1), (64, 64)])
def test_a_picture_keeps_its_shape_in_a_cell(size):
    cell = np.asarray(in_cell(Image.new("RGB", size, "black"), 64))
    rows, columns = ((cell == 0).all(axis=2).any(axis=axis).sum() for axis in (1, 0))
    assert max(rows, columns) == 64
    assert columns / rows == pytest.approx(size[0] / size[1], rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tag": 3}, "has 2 LoRA tags, number 3"),
        ({"tag": 0}, "number 0"),
        ({"length": 13}, "no list of 13"),
        ({"length": 12}, "not in the list of 12.*OUT11.*longer"),
    ],
)
def test_what_can_not_be_is_said_before_the_first_picture(options, message):
    painter = Painter()
    with pytest.raises(JobError, match=message):
        analysed(painter, **options)
    assert not painter.prompts


def test_layers_outside_of_all_blocks_are_no_hindrance():
    assert analysed(Painter(), present=(*PRESENT, "other")).whole.rms > 0


def test_pictures_that_can_not_be_compared_are_refused():
    sizes = iter([(8, 8), (8, 8), (8, 9)])
    with pytest.raises(JobError, match="differ in size"):
        analysed(lambda _: Image.new("RGB", next(sizes)))
    with pytest.raises(JobError, match="2 sizes"):
        analysed(lambda _: [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))])
    with pytest.raises(JobError, match="0 sizes"):
        analysed(lambda _: [])
