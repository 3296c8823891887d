"""The X/Y/Z plot's own run over our axes: each picture is that of the tag written by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.webui_real.server import AnswerError
from tests.webui_real.test_pictures import TEXT

if TYPE_CHECKING:
    from tests.webui_real.server import Answer, WebUI

SCRIPT = "x/y/z plot"
IN04 = ",".join("1" if index == 5 else "0" for index in range(26))

PLOTS = [
    ("block preset", "MIDD, OUTALL", ["lbw=MIDD", "lbw=OUTALL"]),
    ("single block", "IN04", [f"lbw={IN04}"]),
    ("element", "IN05-OUT05:attn:0, ATTNDEEPON", ["lbwe=IN05-OUT05;attn;0", "lbwe=ATTNDEEPON"]),
    ("start", "0-2 (+2)", ["start=0", "start=2"]),
    ("stop", "0.4", ["stop=0.4"]),
    ("curve", '1@0;0@2, "0@0,1@1"', ["unet=1@0;0@2", "unet=0@0,1@1"]),
]


def plot(webui: WebUI, label: str, values: str, prompt: str) -> Answer:
    """One row of a plot, with the values as a user types them."""
    scripts = webui.get("/sdapi/v1/script-info")
    labels = next(one for one in scripts if one["name"] == SCRIPT and not one["is_img2img"])["args"][0]["choices"]
    axes = [labels.index(label), values, [], 0, "", [], 0, "", []]
    shown = [False, True, False, False, False, False, False, 0, True]  # no legend, single pictures, text inputs
    return webui.draw(prompt, script_name=SCRIPT, script_args=[*axes, *shown], steps=3)


@pytest.mark.parametrize(("what", "values", "arguments"), PLOTS)
def test_each_picture_of_a_plot_is_that_of_the_tag(webui: WebUI, what: str, values: str, arguments: list[str]) -> None:
    plotted = plot(webui, f"LoRA 1: {what}", values, f"{TEXT} <lora:a:0.8>").pictures[1:]  # the first is the grid
    expected = [webui.draw(f"{TEXT} <lora:a:0.8:{one}>", steps=3).picture for one in arguments]
    assert len(plotted) == len(expected)
    assert all(np.array_equal(one, other) for one, other in zip(plotted, expected, strict=True))


def test_a_value_that_can_not_be_ends_the_plot_before_the_first_picture(webui: WebUI) -> None:
    steps = [webui.console().count("it/s]")]
    webui.draw(TEXT)
    steps.append(webui.console().count("it/s]"))
    with pytest.raises(AnswerError, match="LoRA 1: single block: the model has no block 'IN12'"):
        plot(webui, "LoRA 1: single block", "IN04, IN12", f"{TEXT} <lora:a:0.8>")
    steps.append(webui.console().count("it/s]"))
    assert steps[0] < steps[1] == steps[2]
