"""The sub-tab that shows what a file is, and changes its metadata."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.core.saving import no_progress
from lib_lora.errors import JobError, ModelError
from lib_lora.tools.inspect import inspect_file
from lib_lora.ui.inspection import inspection_panel
from lib_lora.ui.latest import Latest
from lib_lora.ui.loaded import loaded_model
from lib_lora.ui.markup import job_status, message
from lib_lora.ui.metadata_editor import Edited, changes_panel
from lib_lora.ui.versions import listen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lib_lora.core.saving import Progress
    from lib_lora.ui.jobs import Slot
    from lib_lora.ui.page import Page

SUFFIX = ".safetensors"


def build(page: Page) -> None:
    """Put the sub-tab on the page that is being made."""
    with page.sub_tab("tab.inspect"):
        edited = gr.State()
        with gr.Row():
            with gr.Column():
                lora = page.loras("inspect.lora")
                model = page.choice("inspect.model", lambda: [*_model_files(page)])
                stop = page.add(gr.Button, "inspect.stop")
            with gr.Column():
                file = page.add(gr.File, "inspect.file", file_types=[SUFFIX])
        status, panel = gr.HTML(), gr.HTML(elem_id="prefuse-inspect-panel")
        editor = _Editor(page, edited, panel)
        slot = page.slot("inspect")
        latest = Latest(slot)
        sources = [lora, model, file]
        outputs = [status, edited, panel, *editor.shown, *sources]

        def listen_to(event: Any, source: Any, find: Callable[[Any], Path]) -> None:
            others = tuple(gr.update() if one is source else gr.update(value=None) for one in sources)

            def inspect(value: Any) -> Iterator[tuple[Any, ...]]:
                for state in latest.run(
                    lambda progress: inspected(page, find(value), progress, is_copy=source is file)
                ):
                    told = gr.update() if state is None else job_status(page.texts, state)
                    updates = (gr.update(),) * (len(outputs) - 1)
                    if state is not None and state.result is not None:
                        updates = (*editor.updates(state.result), *others)
                    yield (told, *updates)

            listen(event, inspect, [source], outputs)

        listen_to(lora.input, lora, lambda name: page.host.catalog.find(name).path)
        listen_to(model.input, model, lambda name: _model_file(page, name))
        listen_to(file.upload, file, lambda given: Path(given.name))
        listen(stop.click, slot.cancel, quick=True)


class _Editor:
    """The part that changes metadata.

    Attributes:
        shown: What is shown of the file, beside the panel.
    """

    def __init__(self, page: Page, edited: Any, panel: Any) -> None:
        self._page = page
        self._lists = page.refreshed()
        # Not folded: newest gradio loses what is typed into boxes that were filled while an accordion hid them.
        with gr.Column(elem_id="prefuse-inspect-edit"):
            gr.HTML(f"<h3>{escape(page.texts('inspect.edit'))}</h3>")
            with gr.Row():
                known = page.add(gr.Dropdown, "inspect.known", choices=[])
                key = page.add(gr.Textbox, "inspect.key")
            text = page.add(gr.Textbox, "inspect.text", lines=4, max_lines=16)
            with gr.Row():
                buttons = [page.add(gr.Button, f"inspect.{word}") for word in ("set", "remove", "undo")]
            changes = gr.HTML(elem_id="prefuse-inspect-changes")
            with gr.Row():
                name = page.add(gr.Textbox, "inspect.name")
                replace = page.add(gr.Checkbox, "inspect.replace", value=False)
                with gr.Column():
                    save = page.add(gr.Button, "inspect.save", variant="primary")
                    cancel = page.add(gr.Button, "inspect.cancel")
            status = gr.HTML()
        self.shown = [known, key, text, changes]
        listen(known.input, self._choose, [edited, known], [key, text])
        actions = (self._set, self._remove, self._undo)
        for button, action in zip(buttons, actions, strict=True):
            listen(button.click, action, [edited, key, text], [edited, *self.shown])
        self._saved = [status, edited, panel, *self.shown, name, replace, *page.choices]
        slot = page.slot("inspect.save")
        listen(save.click, self._saver(slot), [edited, name, replace], self._saved)
        listen(cancel.click, slot.cancel, quick=True)

    def updates(self, edited: Edited) -> tuple[Any, ...]:
        """For the state, the panel, and `shown`."""
        panel = inspection_panel(self._page.texts, edited.found)
        return (edited, panel, *self._updates(edited, ""))

    def _updates(self, edited: Edited, key: str) -> tuple[Any, ...]:
        """For `shown`."""
        known = gr.update(choices=edited.keys(), value=None)
        return known, key, edited.text(key) or "", changes_panel(self._page.texts, edited)

    def _choose(self, edited: Edited | None, key: str | None) -> tuple[str, str]:
        return (key, edited.text(key) or "") if edited and key else ("", "")

    def _set(self, edited: Edited | None, key: str, text: str) -> tuple[Any, ...]:
        return self._changed(edited, key, text)

    def _remove(self, edited: Edited | None, key: str, _: str) -> tuple[Any, ...]:
        return self._changed(edited, key, None)

    def _changed(self, edited: Edited | None, key: str, text: str | None) -> tuple[Any, ...]:
        if edited is None or not key:
            words = self._page.texts("inspect.choose" if edited is None else "inspect.choose_key")
            return (*(gr.update(),) * len(self.shown), message(words, "refused"))
        changed = edited.change(key, text)
        return (changed, *self._updates(changed, key))

    def _undo(self, edited: Edited | None, key: str, _: str) -> tuple[Any, ...]:
        if edited is None:
            return self._changed(edited, key, None)
        return (edited.undone(), *self._updates(edited.undone(), ""))

    def _saver(self, slot: Slot) -> Callable[..., Iterator[tuple[Any, ...]]]:
        texts = self._page.texts

        def save(edited: Edited | None, name: str, replace: bool) -> Iterator[tuple[Any, ...]]:
            for state in slot.run(lambda progress: self._save(edited, name, replace, progress)):
                told = job_status(texts, state)
                if state.result is None:
                    yield (told, *(gr.update(),) * (len(self._saved) - 1))
                    continue
                told += message(texts("inspect.saved", path=state.result.path))
                yield (told, *self.updates(state.result), "", False, *self._chosen(state.result.path))

        return save

    def _chosen(self, path: Path) -> list[Any]:
        """The lists of LoRAs and of models with a file in them, which is chosen."""
        models = {file: name for name, file in _model_files(self._page).items()}
        names = (self._page.host.catalog.tag_name(path) or None, models.get(path))
        return [{**update, "value": name} for update, name in zip(self._lists(), names, strict=True)]

    def _save(self, edited: Edited | None, name: str, replace: bool, progress: Progress) -> Edited:
        """Write it, and look at what was written."""
        if edited is None:
            raise JobError(self._page.texts("inspect.choose"))
        written = edited.save(self._page.host, name, replace=replace, progress=progress)
        self._page.host.catalog.refresh()
        return inspected(self._page, written.path, no_progress, is_copy=False)


def inspected(page: Page, path: Path, progress: Progress, *, is_copy: bool) -> Edited:
    """Look at a file, laid over the loaded model."""
    return Edited(path, inspect_file(path, loaded_model(page.host), progress=progress), is_copy)


def _model_files(page: Page) -> dict[str, Path]:
    """The models that are one file."""
    return {name: path for name, path in page.host.models().items() if path.is_file()}


def _model_file(page: Page, name: str) -> Path:
    """Raises: ModelError: If there is none of that name."""
    files = _model_files(page)
    if name not in files:
        raise ModelError(page.texts("inspect.no_such_model", name=name))
    return files[name]
