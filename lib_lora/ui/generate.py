"""The sub-tab that makes pictures, for where no WebUI does."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.compile.choose import BACKENDS, OFF
from lib_lora.errors import RequestError
from lib_lora.hosts.guard import attempt, sentence
from lib_lora.hosts.host import DEFAULT_SAMPLER, SEEDS, SIZE_STEP, GenerateRequest
from lib_lora.hosts.standalone.infotext import parse_infotext, png_infotext, settings_of
from lib_lora.ui.compiling import told
from lib_lora.ui.markup import job_status, message, picture_report
from lib_lora.ui.versions import listen, uploaded
from lib_lora.ui.words import PROMPT
from lib_lora.ui.workshop import bake_script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import Picture
    from lib_lora.ui.jobs import JobState
    from lib_lora.ui.page import Page

MOST_STEPS = 150
MOST_PICTURES = 16
MOST_PIXELS = 2048
LIMITS = {"steps": (1, MOST_STEPS), "width": (0, MOST_PIXELS), "height": (0, MOST_PIXELS), "cfg": (1, 30)}
"""Of the sliders that an infotext can move."""
RANDOM = -1
FIELDS = ("prompt", "negative", "sampler", "steps", "width", "height", "cfg", "count", "seed")
"""Controls that say what to draw, as `GenerateRequest` names them."""
READ = tuple(field for field in FIELDS if field != "count")
"""Those that an infotext has."""


def build(page: Page) -> None:
    """Put the sub-tab on the page that is being made."""
    with page.sub_tab("tab.generate") as tab, gr.Column(elem_classes=["prefuse-generate"]):
        with gr.Row(elem_classes=["prefuse-reader"]):
            with gr.Column(scale=4, min_width=280):
                prompt = page.add(gr.Textbox, "generate.prompt", lines=3, elem_classes=[PROMPT])
                negative = page.add(gr.Textbox, "generate.negative", lines=2)
            with gr.Column(scale=1, min_width=160):
                start = page.add(gr.Button, "generate.start", variant="primary", elem_classes=["prefuse-start"])
                stop = page.add(gr.Button, "generate.stop")
                with gr.Row():
                    read = page.add(gr.Button, "generate.read", size="sm", min_width=70)
                    drop = page.add(gr.UploadButton, "generate.read_file", size="sm", min_width=70, file_types=[".png"])
                bake = page.add(gr.Button, "generate.bake", size="sm")
                listen(bake.click, None, js=bake_script(page.texts))
        with gr.Row(elem_classes=["prefuse-sides"]):
            with gr.Column(min_width=280):
                _model(page, tab)
                controls = {"prompt": prompt, "negative": negative, **_settings(page)}
            with gr.Column(min_width=280, elem_classes=["prefuse-first"]):
                status = gr.HTML(elem_id="prefuse-generate-status")
                gallery = page.add(gr.Gallery, "generate.gallery", columns=2, object_fit="contain", height="auto")
                report = gr.HTML(elem_id="prefuse-generate-report")
        last = gr.State(RANDOM)
    _drawing(page, controls, (start, stop), [status, gallery, report, last])
    _reading(page, controls, (read, drop), status)
    listen(controls["last"].click, lambda seed: seed, [last], [controls["seed"]], quick=True)
    listen(controls["random"].click, lambda: RANDOM, (), [controls["seed"]], quick=True)


def _settings(page: Page) -> dict[str, Any]:
    """Controls of how it is drawn, by field, and the two buttons beside the seed."""
    with gr.Row():
        sampler = page.add(gr.Dropdown, "generate.sampler", choices=page.host.samplers(), value=DEFAULT_SAMPLER)
        steps = _slider(page, "steps", value=20, step=1)
    with gr.Row():
        width, height = (_slider(page, side, value=0, step=SIZE_STEP) for side in ("width", "height"))
    with gr.Row():
        cfg = _slider(page, "cfg", value=7, step=0.5)
        count = page.add(gr.Slider, "generate.count", minimum=1, maximum=MOST_PICTURES, value=1, step=1)
    with gr.Row(elem_classes=["prefuse-seed"]):
        seed = page.add(gr.Number, "generate.seed", value=RANDOM, precision=0, scale=3, min_width=120)
        random = page.add(gr.Button, "generate.random", size="sm", scale=1, min_width=70)
        last = page.add(gr.Button, "generate.last", size="sm", scale=1, min_width=70)
    named = {"sampler": sampler, "steps": steps, "width": width, "height": height, "cfg": cfg, "count": count}
    return {**named, "seed": seed, "random": random, "last": last}


def _slider(page: Page, field: str, **options: Any) -> Any:
    least, most = LIMITS[field]
    return page.add(gr.Slider, f"generate.{field}", minimum=least, maximum=most, min_width=130, **options)


def _model(page: Page, tab: Any) -> None:
    """The choices of a model, which is loaded at once (another sub-tab may do that too), and of how it is compiled."""
    slot = page.slot("generate.model")
    with gr.Row():
        model = page.choice("generate.model", lambda: [*page.host.models()], value=page.host.model())
        compiler = page.add(
            gr.Dropdown, "generate.compile", choices=[OFF, *BACKENDS], value=page.host.compiler(), min_width=100
        )
    status = gr.HTML(elem_id="prefuse-generate-model-status")

    def load(name: str) -> Iterator[tuple[str, Any]]:
        for state in slot.run(lambda _: page.host.use_model(name)):
            ended = state.phase not in ("waiting", "running")
            yield job_status(page.texts, state), gr.update(value=page.host.model()) if ended else gr.update()

    def compile_with(name: str) -> Iterator[str]:
        for state in slot.run(lambda _: page.host.use_compiler(name)):
            yield job_status(page.texts, state)

    listen(model.input, load, [model], [status, model])
    chosen = listen(compiler.input, compile_with, [compiler], [status])
    listen(chosen.then, lambda: told(page), (), [page.compiling], quick=True)
    listen(tab.select, page.host.model, (), [model])


def _drawing(page: Page, controls: dict[str, Any], buttons: tuple[Any, Any], outputs: list[Any]) -> None:
    """Draw what the controls say; pictures that were there stay until there are others."""
    slot = page.slot("generate")
    start, stop = buttons

    def work_of(*values: Any) -> Callable[[Progress], tuple[list[Picture], int]]:
        def work(progress: Progress) -> tuple[list[Picture], int]:
            request = _request(**dict(zip(FIELDS, values, strict=True)))
            return page.host.generate(request, progress), request.seed

        return work

    def shown(state: JobState[tuple[list[Picture], int]]) -> tuple[Any, ...]:
        pictures = (gr.update(),) * 3 if state.result is None else _shown(page, *state.result)
        return (page.job_told(slot, state), *pictures)

    page.run_jobs(start.click, slot, work_of, lambda: shown, [controls[field] for field in FIELDS], outputs)
    listen(stop.click, slot.cancel, quick=True)


def _reading(page: Page, controls: dict[str, Any], sources: tuple[Any, Any], status: Any) -> None:
    """Fill the controls from an infotext: the prompt's, or that of a picture."""
    prompt, picture = sources
    outputs = [status, *(controls[field] for field in READ)]

    def fill(text: Callable[[], str]) -> tuple[Any, ...]:
        found, error = attempt("reading an infotext", lambda: settings_of(parse_infotext(text())))
        updates = _fields(found or {}, page.host.samplers())
        return (message(sentence(error), "refused") if error else "", *updates)

    listen(prompt.click, lambda text: fill(lambda: text), [controls["prompt"]], outputs, quick=True)
    listen(picture.upload, lambda file: fill(lambda: png_infotext(uploaded(file))), [picture], outputs)


def _fields(found: Mapping[str, Any], samplers: Sequence[str]) -> list[Any]:
    """Updates of the controls in `READ`; what was not found, or can not be chosen here, stays."""
    fitting = {**found}
    for field, (least, most) in LIMITS.items():
        if field in fitting:
            fitting[field] = min(max(fitting[field], least), most)
    if fitting.get("sampler") not in samplers:
        fitting.pop("sampler", None)
    return [gr.update(value=fitting[field]) if field in fitting else gr.update() for field in READ]


def _request(
    prompt: str,
    negative: str,
    sampler: str,
    steps: float | None,
    width: float | None,
    height: float | None,
    cfg: float | None,
    count: float | None,
    seed: float | None,
) -> GenerateRequest:
    """What the controls ask for; a box of a number may be empty.

    Raises:
        RequestError: If the number of steps or pictures, or the guidance scale, is not given.
    """
    if not steps or not count or cfg is None:
        raise RequestError("Give the number of steps and pictures and the guidance scale.")
    number = int(count)
    return GenerateRequest(
        prompt=prompt,
        negative=negative,
        sampler=sampler,
        steps=int(steps),
        width=int(width or 0) or None,
        height=int(height or 0) or None,
        cfg=float(cfg),
        count=number,
        seed=secrets.randbelow(SEEDS - number) if seed is None or seed < 0 else int(seed),
    )


def _shown(page: Page, pictures: Sequence[Picture], seed: int) -> tuple[list[Any], str, int]:
    """The gallery, what is told below it, and the seed of the first picture."""
    images = [str(picture.path) if picture.path is not None else picture.image for picture in pictures]
    reports = [picture_report(page.texts, seed + index, picture) for index, picture in enumerate(pictures)]
    return images, "".join(reports), seed
