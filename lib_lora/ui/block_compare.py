"""Two presets of block weights side by side: one prompt, one seed, two pictures, and how they differ."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.errors import JobError
from lib_lora.hosts.host import SEEDS, GenerateRequest
from lib_lora.tools.analyse_pictures import compare_pair
from lib_lora.ui.block_view import Form
from lib_lora.ui.markup import message, report_lines
from lib_lora.ui.versions import listen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import Host, Picture
    from lib_lora.tools.analyse_pictures import Change
    from lib_lora.ui.block_view import BlockView
    from lib_lora.ui.block_weights import Controls
    from lib_lora.ui.jobs import JobState
    from lib_lora.ui.page import Page

MOST_STEPS = 150
LARGEST = 255


@dataclass(frozen=True, eq=False)
class Pair:
    """Two pictures.

    Attributes:
        names: What each was made with.
        pictures: The pictures.
        change: From the first to the second.
        brighter: What the map of the difference was multiplied by.
    """

    names: tuple[str, str]
    pictures: tuple[Picture, Picture]
    change: Change
    brighter: float


def draw_pair(
    host: Host,
    request: Callable[[str], GenerateRequest],
    names: tuple[str, str],
    tags: tuple[str, str],
    progress: Progress,
) -> Pair:
    """Draw one prompt with two tags, from one seed.

    Args:
        host: Draws.
        request: Gives what to draw with a tag in the prompt.
        names: For the user.
        tags: ``""`` for none.
        progress: Told the steps of both; what it raises ends the drawing.

    Raises:
        PrefuseError: If one can not be drawn.
    """

    def draw(index: int) -> Picture:
        def told(done: int, total: int) -> None:
            progress(index * total + done, 2 * total)

        return host.generate(request(tags[index]), told, save=False)[0]

    pictures = draw(0), draw(1)
    change, brighter = compare_pair(names[1], pictures[0].image, pictures[1].image)
    return Pair(names, pictures, change, brighter)


class CompareForm:
    """The controls' choices, and what is made of them.

    Attributes:
        slot: Where it is drawn.
        sliders: The choice of what the sliders say.
        none: The choice of no LoRA.
    """

    def __init__(self, page: Page, view: BlockView) -> None:
        self._page = page
        self._texts = page.texts
        self._view = view
        self.slot = page.slot("blocks.compare")
        self.sliders, self.none = page.texts("blocks.as_sliders"), page.texts("blocks.no_lora")

    def names(self) -> list[str]:
        """What a side can be."""
        return [self.sliders, self.none, *self._view.names()]

    def work_of(self, *values: Any) -> Callable[[Progress], tuple[Pair, int]]:
        """What is to be done of the form's values."""
        prompt, seed, steps, left, right, *rest = values
        form = Form(*rest)
        seed = secrets.randbelow(SEEDS) if seed is None or seed < 0 else int(seed)

        def request(tag: str) -> GenerateRequest:
            return GenerateRequest(prompt=f"{prompt} {tag}".strip(), steps=int(steps), seed=seed)

        def work(progress: Progress) -> tuple[Pair, int]:
            tags = self._tag(form, left), self._tag(form, right)
            return draw_pair(self._page.host, request, (left, right), tags, progress), seed

        return work

    def shown(self, state: JobState[tuple[Pair, int]]) -> tuple[Any, ...]:
        """How far it is, and then the pictures and their difference."""
        shown = (gr.update(), gr.update()) if state.result is None else self._result(*state.result)
        return (self._page.job_told(self.slot, state), *shown)

    def _tag(self, form: Form, side: str) -> str:
        if side == self.none:
            return ""
        if not form.lora:
            raise JobError(self._texts("blocks.no_tag"))
        return self._view.tag(form, None if side == self.sliders else side)

    def _result(self, pair: Pair, seed: int) -> tuple[Any, str]:
        pictures = [
            *((one.image, name) for one, name in zip(pair.pictures, pair.names, strict=True)),
            (pair.change.difference, self._texts("blocks.difference", times=f"{pair.brighter:.3g}")),
        ]
        told = self._texts(
            "blocks.differ",
            rms=f"{pair.change.rms / LARGEST:.2%}",
            differing=f"{pair.change.differing:.1%}",
            seed=seed,
        )
        return pictures, message(told) + "".join(report_lines(one.report) for one in pair.pictures)


def build(page: Page, view: BlockView, controls: Controls) -> Sequence[tuple[Any, Callable[[], list[str]]]]:
    """Put the controls on the page.

    Args:
        page: That is being made.
        view: Of the sub-tab.
        controls: The sub-tab's.

    Returns:
        The lists that have names of presets, and what they offer.
    """
    form = CompareForm(page, view)
    with gr.Accordion(page.texts("blocks.compare"), open=True), gr.Row(elem_id="prefuse-blocks-compare-form"):
        with gr.Column(min_width=320):
            prompt = page.add(gr.Textbox, "blocks.prompt", lines=2, elem_classes=["prefuse-prompt"])
            with gr.Row():
                left = page.choice("blocks.left", form.names, value=form.sliders)
                right = page.choice("blocks.right", form.names, value=form.none)
            with gr.Row():
                seed = page.add(gr.Number, "blocks.seed", value=-1, precision=0)
                steps = page.add(gr.Slider, "blocks.steps", minimum=1, maximum=MOST_STEPS, value=20, step=1)
            with gr.Row():
                start = page.add(gr.Button, "blocks.start", variant="primary", elem_classes=["prefuse-start"])
                stop = page.add(gr.Button, "blocks.stop")
        with gr.Column(min_width=320):
            status = gr.HTML()
            gallery = page.add(gr.Gallery, "blocks.gallery", columns=3, object_fit="contain")
            told = gr.HTML()
    inputs = [prompt, seed, steps, left, right, *controls]
    page.run_jobs(start.click, form.slot, form.work_of, lambda: form.shown, inputs, [status, gallery, told])
    listen(stop.click, form.slot.cancel, quick=True)
    return [(left, form.names), (right, form.names)]
