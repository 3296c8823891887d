"""The sub-tab that makes pictures, for where no WebUI does."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.hosts.host import DEFAULT_SAMPLER, SEEDS, SIZE_STEP, GenerateRequest
from lib_lora.ui.markup import job_status, report_lines
from lib_lora.ui.versions import listen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lib_lora.hosts.host import Picture
    from lib_lora.ui.page import Page

MOST_STEPS = 150
MOST_PICTURES = 16
MOST_PIXELS = 2048


def build(page: Page) -> None:
    """Put the sub-tab on the page that is being made."""
    slot = page.slot()
    with page.sub_tab("tab.generate"):
        with gr.Row():
            with gr.Column(scale=3):
                prompt = page.add(gr.Textbox, "generate.prompt", lines=3, elem_classes=["prefuse-prompt"])
                negative = page.add(gr.Textbox, "generate.negative", lines=2)
            with gr.Column(scale=1, min_width=160):
                start = page.add(gr.Button, "generate.start", variant="primary", elem_classes=["prefuse-start"])
                stop = page.add(gr.Button, "generate.stop")
        with gr.Row():
            with gr.Column():
                settings = _settings(page)
            with gr.Column():
                status = gr.HTML()
                gallery = page.add(gr.Gallery, "generate.gallery", columns=2, object_fit="contain")
                report = gr.HTML()
        inputs = [prompt, negative, *settings]

        def draw(*values: Any) -> Iterator[tuple[Any, ...]]:
            for state in slot.run(lambda progress: page.host.generate(_request(*values), progress)):
                shown = (gr.update(), gr.update())
                if state.result is not None:
                    shown = ([_shown(one) for one in state.result], _reports(state.result))
                yield (job_status(page.texts, state), *shown)

        listen(start.click, draw, inputs, [status, gallery, report])
        listen(stop.click, slot.cancel, quick=True)


def _settings(page: Page) -> list[Any]:
    model = page.choice("generate.model", lambda: [*page.host.models()], value=page.host.model())
    sampler = page.add(gr.Dropdown, "generate.sampler", choices=page.host.samplers(), value=DEFAULT_SAMPLER)
    steps = page.add(gr.Slider, "generate.steps", minimum=1, maximum=MOST_STEPS, value=20, step=1)
    sizes: dict[str, Any] = {"minimum": 0, "maximum": MOST_PIXELS, "value": 0, "step": SIZE_STEP}
    width = page.add(gr.Slider, "generate.width", **sizes)
    height = page.add(gr.Slider, "generate.height", **sizes)
    cfg = page.add(gr.Slider, "generate.cfg", minimum=1, maximum=30, value=7, step=0.5)
    count = page.add(gr.Slider, "generate.count", minimum=1, maximum=MOST_PICTURES, value=1, step=1)
    seed = page.add(gr.Number, "generate.seed", value=-1, precision=0)
    listen(model.change, page.host.use_model, [model])
    return [sampler, steps, width, height, cfg, count, seed]


def _request(
    prompt: str, negative: str, sampler: str, steps: int, width: int, height: int, cfg: float, count: int, seed: int
) -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt,
        negative=negative,
        sampler=sampler,
        steps=int(steps),
        width=int(width) or None,
        height=int(height) or None,
        cfg=float(cfg),
        count=int(count),
        seed=secrets.randbelow(SEEDS - int(count)) if seed is None or int(seed) < 0 else int(seed),
    )


def _shown(picture: Picture) -> Any:
    return str(picture.path) if picture.path is not None else picture.image


def _reports(pictures: list[Picture]) -> str:
    return "".join(report_lines(picture.report) for picture in pictures)
