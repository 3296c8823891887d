"""The sub-tab that trains LoRAs: a form over the trainer, and how the training goes."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.hosts.guard import attempt, sentence
from lib_lora.hosts.standalone.libraries import install_command, missing_to_train
from lib_lora.train.option_values import read_toml
from lib_lora.ui.markup import duration, message
from lib_lora.ui.train_form import (
    ANSWERED,
    ASKED,
    FIELDS,
    NONE,
    PARTS,
    answers_of,
    earlier,
    picture_folders,
    plan_of,
    training_folder,
)
from lib_lora.ui.train_panel import loss_panel, made_panel, preview_panel, running_line
from lib_lora.ui.train_run import Made, Preview, Watch, preview, train_plan
from lib_lora.ui.versions import listen, uploaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from lib_lora.core.saving import Progress
    from lib_lora.ui.jobs import JobState
    from lib_lora.ui.page import Page
    from lib_lora.ui.texts import Texts
    from lib_lora.ui.workshop_forms import Field

    Work = Callable[..., Preview | Made]

PANEL = "#prefuse-train-panel"
OPEN = ("network", "course")
"""Sections that are open at first."""
FREE = ("optimizer_type", "lr_scheduler")
"""Lists where another name may be written."""
CHOICES: Mapping[str, tuple[str, str, Callable[[Page], list[str]]]] = {
    "network": ("lora", "train.lora", lambda page: [NONE, *page.lora_names()]),
    "more": ("reg", "train.reg_folder", lambda page: [NONE, *picture_folders(page.host)]),
}
"""Section → answer, key and choices of a list in it."""
LONG = (*FIELDS["blocks"], *FIELDS["samples"][:1], *FIELDS["more"])
NARROW, WIDE, WIDEST = 130, 280, 400
"""Least width of a control in pixels."""
MOST_LINES = 12
LINES = {"further": 4, "sample_prompts": 3}
IF_EMPTY = {"max_train_epochs": "train.by_steps", "unet_lr": "train.same", "text_encoder_lr": "train.same"}
"""What stands in a field that is empty."""
PLOT_SECONDS = 2.0
"""Between two drawings of the losses."""
SHOWN_SAMPLES = 24
SOMETIMES = tuple(field for field in ASKED if field.when)
"""What counts only with some types of networks."""


def build(page: Page) -> None:
    """Put the sub-tab on the page that is being made."""
    with page.sub_tab("tab.train") as tab:
        Sheet(page).connect(tab)


def try_script(texts: Texts) -> str:
    """A function of the browser that puts the tag of what was made into the prompt, and goes there."""
    return f"() => {{ window.prefuseTry({json.dumps(PANEL)}, {json.dumps(texts('tab.generate'))}); return []; }}"


class Sheet:
    """The form on the page, and the training that it shows."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._slot = page.slot("train")
        self._newest = object()
        self._controls: dict[str, Any] = {}
        gr.HTML(_welcome(page))
        with gr.Row(elem_classes=["prefuse-sides"]):
            with gr.Column(min_width=280):
                self._ask()
            with gr.Column(min_width=280):
                self._answer()

    def _ask(self) -> None:
        page, controls = self._page, self._controls
        with gr.Row():
            controls["model"] = page.choice("train.model", lambda: [*page.host.models()], value=_first_model(page))
            controls["pictures"] = page.choice("train.pictures", lambda: [*picture_folders(page.host)])
        with gr.Row():
            controls["name"] = page.add(gr.Textbox, "train.name", max_lines=1, value="")
            self._replace = page.add(gr.Checkbox, "train.replace", value=False)
        for section, fields in FIELDS.items():
            with gr.Accordion(page.texts(f"train.section.{section}"), open=section in OPEN):
                with gr.Row():
                    controls |= {field.name: self._field(field) for field in fields if field.kind != "tick"}
                    if section in CHOICES:
                        name, key, source = CHOICES[section]
                        controls[name] = page.choice(key, partial(source, page), value=NONE)
                # Newest gradio squeezes them in a row.
                controls |= {field.name: self._field(field) for field in fields if field.kind == "tick"}
        with gr.Row(elem_classes=["prefuse-seed"]):
            self._earlier = page.choice("train.earlier", lambda: [*earlier(page.host)])
            self._read = page.add(gr.UploadButton, "train.read", size="sm", file_types=[".toml"])

    def _field(self, field: Field) -> Any:
        options: dict[str, Any] = {"value": field.value, "visible": not field.when, "min_width": NARROW}
        kind = {"tick": gr.Checkbox, "options": gr.Dropdown, "text": gr.Textbox}.get(field.kind, gr.Number)
        if field.kind == "options":
            options |= {"choices": [*field.options], "allow_custom_value": field.name in FREE}
        if field.name == "parts":  # whose options have words
            kind, choices = gr.Radio, [(self._page.texts(f"train.parts.{part}"), part) for part in PARTS]
            options = {"value": field.value, "choices": choices, "min_width": WIDEST}
        if field.kind == "whole":
            options["precision"] = 0
        if field.kind == "text":
            lines = LINES.get(field.name, 1)
            options |= {"lines": lines, "max_lines": MOST_LINES * (lines > 1) or 1}
            options["placeholder"] = self._page.texts(IF_EMPTY[field.name]) if field.name in IF_EMPTY else ""
        if field in LONG:
            options["min_width"] = WIDEST if field.name in LINES else WIDE
        return self._page.add(kind, f"train.{field.name}", **options)

    def _answer(self) -> None:
        add = self._page.add
        with gr.Row():
            self._start = add(gr.Button, "train.start", variant="primary", elem_classes=["prefuse-start"], min_width=90)
            self._preview = add(gr.Button, "train.preview", min_width=90)
            self._resume = add(gr.Button, "train.resume", min_width=90)
        with gr.Row():
            self._pause, self._stop, self._cancel = (
                add(gr.Button, f"train.{key}", size="sm", min_width=90) for key in ("pause", "stop", "cancel")
            )
        self._status = gr.HTML(elem_id="prefuse-train-status")
        self._line = gr.HTML(elem_id="prefuse-train-line")
        self._try = add(gr.Button, "train.try", visible=False)
        self._panel = gr.HTML(elem_id="prefuse-train-panel")
        self._plot = gr.HTML(elem_id="prefuse-train-plot")
        self._samples = add(gr.Gallery, "train.samples", columns=4, object_fit="contain", height="auto", visible=False)

    @property
    def _watch(self) -> Watch:
        """How the newest training goes, which may have begun on an earlier page."""
        return self._slot.kept or Watch()

    @property
    def _outputs(self) -> list[Any]:
        return [self._status, self._line, self._try, self._plot, self._panel, self._samples]

    def connect(self, tab: Any) -> None:
        """Say what happens when.

        Args:
            tab: Of the form; when it is opened, a training that runs is shown again.
        """
        controls = [self._controls[name] for name in ANSWERED]
        host = self._page.host
        works: dict[Any, Work] = {
            self._preview: lambda plan, _, progress, **__: preview(plan, progress),
            self._start: partial(train_plan, host, resume=False),
            self._resume: partial(train_plan, host, resume=True),
        }
        for button, work in works.items():
            begun = listen(button.click, partial(self._begin, work), [self._replace, *controls], quick=True)
            ended = listen(begun.then, self._follow, (), self._outputs)
            listen(ended.then, self._page.refreshed(), (), self._page.choices)
        listen(tab.select, self._follow, (), self._outputs)
        listen(self._pause.click, partial(self._wish, Watch.toggle_pause), quick=True)
        listen(self._stop.click, partial(self._wish, Watch.stop), quick=True)
        listen(self._cancel.click, self._slot.cancel, quick=True)
        listen(self._try.click, None, js=try_script(self._page.texts))
        shown = [self._controls[field.name] for field in SOMETIMES]
        listen(self._controls["type"].change, _counting, [self._controls["type"]], shown, quick=True)
        filled = [self._status, *controls]
        listen(self._earlier.input, self._fill_earlier, [self._earlier], filled)
        listen(self._read.upload, lambda file: self._fill(uploaded(file)), [self._read], filled)

    def _begin(self, work: Work, replace: bool, *values: Any) -> None:
        answers = dict(zip(ANSWERED, values, strict=True))

        def action(progress: Progress) -> Preview | Made:
            self._slot.kept = watch = Watch()
            return work(plan_of(self._page.host, answers), watch, progress, replace=bool(replace))

        self._slot.start(action)

    def _wish(self, change: Callable[[Watch], None]) -> None:
        change(self._watch)

    def _follow(self) -> Iterator[tuple[Any, ...]]:
        """How the trainings of this form go, for the page that asked last."""
        mine = self._newest = object()
        view = _View(self._page)
        yield (gr.update(),) * len(self._outputs)  # gradio 3 empties the outputs of a generator that gives nothing
        for state in self._slot.follow():
            if self._newest is not mine:
                return
            told = self._cancelled(state) if state.phase == "cancelled" else self._page.job_told(self._slot, state)
            yield (told, *view.updates(self._watch, state))

    def _cancelled(self, state: JobState[Any]) -> str:
        return message(self._page.texts("train.cancelled", seconds=duration(state.seconds)))

    def _fill_earlier(self, name: str) -> list[Any]:
        path = earlier(self._page.host).get(name)
        return self._fill(path) if path else [gr.update()] * (1 + len(ANSWERED))

    def _fill(self, path: Path) -> list[Any]:
        """What is said, and the controls as a configuration has them."""
        answers, error = attempt("reading a configuration", lambda: answers_of(self._page.host, read_toml(path)))
        if error is not None or answers is None:
            return [message(sentence(error) if error else "", "refused"), *[gr.update()] * len(ANSWERED)]
        said = message(self._page.texts("train.filled", name=path.name))
        return [said, *(gr.update(value=answers[name]) for name in ANSWERED)]


class _View:
    """What one look at a training has been shown already."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._drawn_at, self._losses, self._samples = -PLOT_SECONDS, -1, -1
        self._can_try: bool | None = None

    def updates(self, watch: Watch, state: JobState[Any]) -> tuple[Any, ...]:
        """The line, the button, the plot, the panel and the pictures; those that are as they were are left."""
        texts, ended = self._page.texts, state.phase not in ("waiting", "running")
        line = running_line(texts, watch) if state.phase == "running" else ""
        panel = "" if line and watch.losses else gr.update()
        if isinstance(state.result, Preview):
            panel = preview_panel(texts, state.result)
        elif isinstance(state.result, Made):
            panel = made_panel(texts, state.result)
        return line, self._button(state), self._plot(watch, ended=ended), panel, self._pictures(watch)

    def _button(self, state: JobState[Any]) -> Any:
        """That which tries what was made."""
        can_try = isinstance(state.result, Made) and bool(state.result.name)
        if can_try == self._can_try:
            return gr.update()
        self._can_try = can_try
        return gr.update(visible=can_try, value=self._page.texts("train.try"))

    def _plot(self, watch: Watch, *, ended: bool) -> Any:
        now, count = time.monotonic(), len(watch.losses)
        if count == self._losses or (now - self._drawn_at < PLOT_SECONDS and not ended):
            return gr.update()
        self._drawn_at, self._losses = now, count
        return loss_panel(self._page.texts, watch)

    def _pictures(self, watch: Watch) -> Any:
        samples = watch.samples[-SHOWN_SAMPLES:]
        if len(watch.samples) == self._samples:
            return gr.update()
        self._samples = len(watch.samples)
        words = self._page.texts
        shown = [(one.image, words("train.sample", step=one.step, prompt=one.prompt)) for one in samples]
        return gr.update(value=shown, visible=bool(shown))


def _counting(kind: str) -> list[Any]:
    """Which fields count with a type of networks."""
    return [gr.update(visible=field.counts({"type": kind})) for field in SOMETIMES]


def _first_model(page: Page) -> str | None:
    """That which draws on our own page; the WebUI's may not be chosen yet."""
    return page.host.model() if page.host.can_draw else None


def _welcome(page: Page) -> str:
    """Where pictures are looked for, and what is missing."""
    lines = message(page.texts("train.where", folder=training_folder(page.host)))
    if missing := missing_to_train():
        values = {"names": ", ".join(missing), "command": install_command(missing)}
        lines += message(page.texts("train.missing", **values), "refused")
    return lines
