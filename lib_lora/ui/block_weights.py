"""The sub-tab of block weights: sliders, the curve over what the LoRA's blocks carry, the tag."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from lib_lora.tools.block_lists import LENGTHS
from lib_lora.ui import block_compare, block_presets
from lib_lora.ui.block_view import BlockView, Updates
from lib_lora.ui.latest import LastAnswer
from lib_lora.ui.versions import listen, text_event

if TYPE_CHECKING:
    from collections.abc import Callable

    from lib_lora.ui.page import Page

LEAST_STRENGTH, MOST_STRENGTH = -2, 2
PUT = "() => { window.prefuseBlocks.put(); return []; }"


class Controls(NamedTuple):
    """What the user moves, in the order of `block_view.Form`."""

    lora: Any
    length: Any
    is_wide: Any
    preset: Any
    text: Any
    strength: Any
    shown: Any


class Panels(NamedTuple):
    """What follows."""

    sliders: Any
    plot: Any
    note: Any
    tag: Any


def build(page: Page) -> None:
    """Put the sub-tab on the page that is being made."""
    view = BlockView(page.host, page.texts)
    with page.sub_tab("tab.blocks"):
        with gr.Row():
            chosen = _choices(page, view)
        with gr.Row():
            with gr.Column(min_width=320, elem_id="prefuse-blocks-curve"):
                plot = gr.HTML(view.first().plot)
                note = gr.HTML()
                text = page.add(gr.Textbox, "blocks.list", value=view.first().text, lines=2)
                strength, tag, put = _tag(page, view)
            with gr.Column(min_width=320):
                sliders = gr.HTML(view.first().sliders, elem_id="prefuse-blocks-sliders")
                buttons, is_wide = _buttons(page)
                presets = block_presets.build(page)
        controls = Controls(*chosen[:2], is_wide, chosen[2], text, strength, gr.State(view.first().shown))
        _connect(view, controls, Panels(sliders, plot, note, tag), buttons)
        listen(put.click, None, js=PUT)
        presets.connect(view, controls, block_compare.build(page, view, controls))


def _choices(page: Page, view: BlockView) -> tuple[Any, Any, Any]:
    lora = page.loras("blocks.lora")
    lengths = [page.texts("blocks.length.auto"), *(page.texts(f"blocks.length.{length}") for length in LENGTHS)]
    length = page.add(gr.Dropdown, "blocks.length", choices=lengths, value=lengths[0], type="index")
    return lora, length, page.choice("blocks.preset", view.names)


def _buttons(page: Page) -> tuple[list[Any], Any]:
    with gr.Row():
        buttons = [page.add(gr.Button, f"blocks.{name}", **block_presets.SMALL) for name in ("zeros", "ones", "invert")]
    return buttons, page.add(gr.Checkbox, "blocks.wide", value=False)


def _tag(page: Page, view: BlockView) -> tuple[Any, Any, Any]:
    ends: dict[str, Any] = {"minimum": LEAST_STRENGTH, "maximum": MOST_STRENGTH, "step": 0.05}
    strength = page.add(gr.Slider, "blocks.strength", value=1, **ends)
    tag = gr.HTML(view.first().tag, elem_id="prefuse-blocks-tag")
    return strength, tag, page.add(gr.Button, "blocks.put", size="sm")


def _connect(view: BlockView, controls: Controls, panels: Panels, buttons: list[Any]) -> None:
    last = gr.State(LastAnswer())
    inputs, outputs = [last, *controls], [controls.text, *panels, controls.shown]
    edits = [view.same(0), view.same(1), view.inverted]
    events = [(button.click, edit) for button, edit in zip(buttons, edits, strict=True)]
    events += [
        (controls.preset.input, view.loaded),
        (controls.length.input, view.resized),
        (controls.is_wide.change, view.unchanged),
    ]
    for event, edit in events:
        listen(event, partial(_last, partial(view.edited, edit)), inputs, outputs, quick=True)
    reading = listen(controls.lora.change, view.reading, [controls.lora], [panels.note], quick=True)
    listen(reading.then, partial(_last, partial(view.edited, view.resized)), inputs, outputs)
    for event in (text_event(controls.text), controls.strength.change):
        listen(event, partial(_last, view.typed), inputs, outputs, quick=True)


def _last(answer: Callable[..., Updates], last: LastAnswer, *values: Any) -> tuple[Any, ...]:
    """What becomes of the controls by their values; nothing, if they were changed again meanwhile."""
    return tuple(last.of(lambda: answer(*values)) or Updates())
