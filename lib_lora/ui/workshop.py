"""The sub-tab of jobs on files: a form for each, what it would do, and what came of it."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.prompt.tags import writable_name
from lib_lora.ui.latest import LastAnswer
from lib_lora.ui.markup import copyable, message
from lib_lora.ui.outcome import MOST_ROWS, outcome_panel
from lib_lora.ui.versions import listen, outputs_of
from lib_lora.ui.words import PROMPT
from lib_lora.ui.workshop_forms import NONE
from lib_lora.ui.workshop_jobs import FORMS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lib_lora.core.saving import Progress
    from lib_lora.tools.outcome import Outcome
    from lib_lora.ui.jobs import JobState
    from lib_lora.ui.page import Page
    from lib_lora.ui.texts import Texts
    from lib_lora.ui.workshop_forms import Field, Form

WIDE = ("tags", "lora", "model")
"""Kinds of fields that stand above the others, each in a line of its own."""
READ_PROMPT = """() => {
    const box = document.querySelector("#prefuse-generate-prompt textarea, #txt2img_prompt textarea");
    return box ? box.value : "";
}"""
"""The prompt of our own page, or of the WebUI's."""


def build(page: Page) -> None:
    """Put the sub-tab on the page that is being made."""
    with page.sub_tab("tab.workshop"):
        with gr.Tabs(elem_id="prefuse-workshop"):
            sheets = [_Sheet(page, form) for form in FORMS]
        for sheet in sheets:
            sheet.connect()


def bake_script(texts: Texts) -> str:
    """A function of the browser that opens the form for merging with the current prompt."""
    titles = ", ".join(json.dumps(texts(key)) for key in ("tab.workshop", "workshop.merge"))
    return f"() => window.prefuseBake({titles})"


class _Sheet:
    """A form on the page."""

    def __init__(self, page: Page, form: Form) -> None:
        self._page = page
        self._form = form
        self._slot = page.slot(f"workshop.{form.key}")
        self._fields: dict[str, Any] = {}
        place = f"prefuse-workshop-{form.key.replace('_', '-')}"
        with gr.Tab(page.texts(f"workshop.{form.key}"), elem_id=place), gr.Row():
            with gr.Column():
                self._ask()
            with gr.Column():
                self._answer()

    def _ask(self) -> None:
        fields = self._form.fields
        for one in fields:
            if one.kind in WIDE:
                self._fields[one.name] = self._field(one)
            if one.kind == "tags":
                self._picker(self._fields[one.name])
        with gr.Row():
            for one in fields:
                if one.kind not in WIDE:
                    self._fields[one.name] = self._field(one)
        with gr.Row():
            self._name = self._add(gr.Textbox, "name", max_lines=1, value="")
            self._replace = self._add(gr.Checkbox, "replace", value=False)
        self._last = gr.State(LastAnswer())

    def _answer(self) -> None:
        with gr.Row():
            self._start = self._add(gr.Button, "start", variant="primary", elem_classes=["prefuse-start"])
            self._preview = self._add(gr.Button, "preview")
            self._stop = self._add(gr.Button, "stop")
        self._status = gr.HTML()
        self._use = self._add(gr.Button, "use", visible=False)
        self._panel = gr.HTML()
        self._made = gr.State("")

    def _add(self, kind: Any, name: str, said_as: str = "", **options: Any) -> Any:
        """A control that other forms have too."""
        words = f"workshop.{said_as or name}"
        return self._page.add(kind, f"workshop.{self._form.key}.{name}", said_as=words, **options)

    def _field(self, one: Field) -> Any:
        is_shown = one.counts({other.name: other.value for other in self._form.fields})
        options: dict[str, Any] = {"value": one.value, "visible": is_shown}
        if one.kind in ("lora", "model"):
            key, words = f"workshop.{self._form.key}.{one.name}", f"workshop.{one.words or one.name}"
            return self._page.choice(key, lambda: self._choices(one), said_as=words, **options)
        kind, own = {
            "tags": (gr.Textbox, {"lines": 3, "elem_classes": [PROMPT]}),
            "options": (gr.Dropdown, {"choices": [*one.options]}),
            "whole": (gr.Number, {"precision": 0}),
            "number": (gr.Number, {}),
            "tick": (gr.Checkbox, {}),
            "text": (gr.Textbox, {"max_lines": 1}),
        }[one.kind]
        return self._add(kind, one.name, one.words, **own, **options)

    def _choices(self, one: Field) -> list[str]:
        if one.kind == "lora":
            return self._page.lora_names()
        return [*([NONE] if one.value == NONE else []), *self._page.host.models()]

    def _picker(self, tags: Any) -> None:
        """Writes tags without knowing how they are written."""
        key = f"workshop.{self._form.key}"
        with gr.Row():
            lora = self._page.loras(f"{key}.picked", said_as="workshop.picked")
            strength = self._add(gr.Number, "strength", value=1)
        with gr.Row():
            add = self._add(gr.Button, "add", size="sm")
            listen(add.click, _with_tag, [tags, lora, strength], [tags])
            if self._form.key == "merge":
                bake = self._add(gr.Button, "bake", size="sm")
                listen(bake.click, None, (), [tags], js=READ_PROMPT)

    def connect(self) -> None:
        """Say what happens when; after all forms are there, for a result can be chosen in each of them."""
        fields = [self._fields[one.name] for one in self._form.fields]
        answers, result = [self._name, self._replace, *fields], [self._status, self._panel, self._use, self._made]
        for button, preview in ((self._start, False), (self._preview, True)):
            work_of = partial(self._work_of, preview=preview)
            ended = self._page.run_jobs(button.click, self._slot, work_of, lambda: self._told, answers, result)
            self._follow(ended.then)
            listen(ended.then, self._page.refreshed(), (), self._page.choices)
        listen(self._stop.click, self._slot.cancel, quick=True)
        listen(self._use.click, self._use_model, [self._made], [self._status])
        for field in fields:
            self._follow(field.change)

    def _follow(self, event: Any) -> None:
        """Suggest a name for what stands in the fields, and show those of them that count."""
        shown = [self._name, *(self._fields[one.name] for one in self._form.fields if one.when)]
        listen(event, self._change, [self._last, *self._fields.values()], shown, quick=True)

    def _values(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return {one.name: value for one, value in zip(self._form.fields, values, strict=True)}

    def _change(self, last: LastAnswer, *values: Any) -> Any:
        """The suggested name, in grey, for what the user writes is never touched; and which fields count."""
        given = dict(zip(self._fields, values, strict=True))
        sometimes = [one for one in self._form.fields if one.when]

        def updates() -> list[Any]:
            name = self._form.suggestion(self._page.host, given)
            return [gr.update(placeholder=name), *(gr.update(visible=one.counts(given)) for one in sometimes)]

        return outputs_of(last.of(updates) or [gr.update()] * (1 + len(sometimes)))

    def _work_of(self, name: str, replace: bool, *values: Any, preview: bool) -> Callable[[Progress], Outcome]:
        host, given = self._page.host, self._values(values)

        def work(progress: Progress) -> Outcome:
            made = self._form.start(host, given, name, replace=bool(replace), preview=preview, progress=progress)
            if made.written:
                host.catalog.refresh()
            return made

        return work

    def _told(self, state: JobState[Outcome]) -> tuple[Any, ...]:
        shown = (gr.update(),) * 3 if state.result is None else self._shown(state.result)
        return self._page.job_told(self._slot, state), *shown

    def _shown(self, made: Outcome) -> tuple[Any, ...]:
        """The panel, the button that uses a model, and its name."""
        texts, model = self._page.texts, self._model_name(made)
        tags = "".join(copyable(texts, tag) for tag in self._tags(made)[:MOST_ROWS])
        return tags + outcome_panel(texts, made), gr.update(visible=bool(model)), model

    def _model_name(self, made: Outcome) -> str:
        """How the host names a model that was made; ``""`` if there is none."""
        models = self._page.host.models() if made.written else {}
        return next((name for name, path in models.items() if path == made.path), "")

    def _tags(self, made: Outcome) -> list[str]:
        """Of LoRAs that were made, how a prompt names them."""
        names = [self._page.host.catalog.tag_name(path) for path in made.paths] if made.written else []
        return [f"<lora:{writable_name(name)}:1>" for name in names if name]

    def _use_model(self, name: str) -> Iterator[Any]:
        for state in self._slot.run(lambda _: self._page.host.use_model(name)):
            words = self._page.texts("workshop.used", name=name)
            yield message(words) if state.phase == "done" else self._page.job_told(self._slot, state)


def _with_tag(tags: str, lora: str | None, strength: float | None) -> str:
    """A prompt with one tag more."""
    tag = f"<lora:{writable_name(lora)}:{1 if strength is None else strength:g}>" if lora else ""
    return " ".join(text for text in (str(tags or "").strip(), tag) if text)
