"""Presets of block weights in the page: saved, renamed, deleted, imported, exported."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from lib_lora.hosts.guard import attempt, sentence
from lib_lora.preset_editor import PresetEditor
from lib_lora.presets import WEIGHTS_FILE
from lib_lora.ui.markup import message
from lib_lora.ui.versions import listen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lib_lora.preset_editor import Imported
    from lib_lora.ui.block_sliders import SliderRange
    from lib_lora.ui.block_view import BlockView
    from lib_lora.ui.block_weights import Controls
    from lib_lora.ui.page import Page


SMALL: dict[str, Any] = {"size": "sm", "min_width": 80}


class PresetForm:
    """The controls, and what they do.

    Every action gives updates of the list of presets, of other lists with the same names, of the name, of what is
    told, and of the question whether a preset shall be deleted.
    """

    def __init__(self, page: Page, view: BlockView, others: Sequence[Callable[[], list[str]]]) -> None:
        self._page = page
        self._texts = page.texts
        self._view = view
        self._others = others

    def saved(self, name: str, text: str, shown: SliderRange, replace: bool) -> list[Any]:
        """The list as a preset."""

        def save() -> list[str]:
            spelled = self._view.list_text(text, shown)
            return [*self._editor.save(name, spelled, replace=replace), self._texts("blocks.saved", name=name.strip())]

        return self._done(save, name.strip())

    def renamed(self, preset: str | None, name: str) -> list[Any]:
        """Another name for the preset that is chosen."""

        def rename() -> list[str]:
            notes = self._editor.rename(preset or "", name)
            return [*notes, self._texts("blocks.renamed", old=preset or "", new=name.strip())]

        return self._done(rename, name.strip())

    def chosen(self) -> Any:
        """Another preset: it is not the one that was to be deleted."""
        return gr.update(visible=False)

    def asked(self, preset: str | None) -> list[Any]:
        """Whether it shall be deleted; the second click says it."""
        if not preset or preset not in self._editor.own():
            words = self._texts("blocks.not_own", name=preset) if preset else self._texts("blocks.none_chosen")
            return [message(words, "refused"), gr.update(visible=False)]
        return ["", gr.update(visible=True, value=self._texts("blocks.sure", name=preset))]

    def deleted(self, preset: str | None) -> list[Any]:
        """It is gone."""

        def delete() -> list[str]:
            return [*self._editor.delete(preset or ""), self._texts("blocks.deleted", name=preset or "")]

        return self._done(delete, None)

    def imported(self, file: Any) -> list[Any]:
        """Those of somebody else's file."""
        return self._done(lambda: [*self._told(self._editor.import_file(file.name))])

    def exported(self) -> list[Any]:
        """All of the user's own, as a text and as a file."""
        text, error = attempt("an export of presets", self._editor.export)
        if error is not None:
            return [gr.update(visible=False), message(sentence(error), "refused")]
        if not text:
            return [gr.update(visible=False), message(self._texts("blocks.none_own"))]
        return [gr.update(value=text, visible=True), self._link(text)]

    @property
    def _editor(self) -> PresetEditor:
        return PresetEditor(self._page.host.presets.folders)

    def _done(self, action: Callable[[], list[str]], *chosen: str | None) -> list[Any]:
        """Act, and tell it; `chosen` is the preset that is chosen afterwards, if that changes."""
        notes, error = attempt("presets", action)
        if error is not None:
            same = [gr.update()] * (2 + len(self._others))
            return [*same, message(sentence(error), "refused"), gr.update(visible=False)]
        names = self._view.names()
        lists = [gr.update(choices=names, value=chosen[0]) if chosen else gr.update(choices=names)]
        lists += [gr.update(choices=[*source()]) for source in self._others]
        told = "".join(message(note) for note in notes or ())
        name = (chosen[0] or "") if chosen else gr.update()
        return [*lists, name, told, gr.update(visible=False)]

    def _told(self, found: Imported) -> Iterator[str]:
        yield self._texts("blocks.imported", saved=len(found.saved) + len(found.renamed), known=len(found.known))
        for old, new in found.renamed.items():
            yield self._texts("blocks.renamed", old=old, new=new)
        yield from found.refused
        yield from found.notes

    def _link(self, text: str) -> str:
        address = f"data:text/plain;charset=utf-8;base64,{b64encode(text.encode()).decode()}"
        words = escape(self._texts("blocks.download", file=WEIGHTS_FILE))
        return f'<a class="prefuse-download" download="{WEIGHTS_FILE}" href="{address}">{words}</a>'


def build(page: Page) -> PresetControls:
    """Put the controls on the page that is being made."""
    with gr.Accordion(page.texts("blocks.presets"), open=True):
        with gr.Row():
            name = page.add(gr.Textbox, "blocks.name", lines=1)
            replace = page.add(gr.Checkbox, "blocks.replace", value=False)
        with gr.Row():
            save = page.add(gr.Button, "blocks.save", **SMALL)
            rename = page.add(gr.Button, "blocks.rename", **SMALL)
            delete = page.add(gr.Button, "blocks.delete", **SMALL)
            upload = page.add(gr.UploadButton, "blocks.import", file_types=[".txt"], **SMALL)
            export = page.add(gr.Button, "blocks.export", **SMALL)
        sure = page.add(gr.Button, "blocks.delete_sure", variant="stop", visible=False)
        note = gr.HTML(elem_id="prefuse-blocks-presets-note")
        shown = page.add(gr.Textbox, "blocks.exported", lines=5, max_lines=12, visible=False, interactive=False)
        link = gr.HTML()
    return PresetControls(page, name, replace, save, rename, delete, upload, export, sure, note, shown, link)


class PresetControls(NamedTuple):
    """The controls, on their page."""

    page: Page
    name: Any
    replace: Any
    save: Any
    rename: Any
    delete: Any
    upload: Any
    export: Any
    sure: Any
    note: Any
    shown: Any
    link: Any

    def connect(
        self, view: BlockView, controls: Controls, others: Sequence[tuple[Any, Callable[[], list[str]]]]
    ) -> None:
        """Let them act.

        Args:
            view: Of the sub-tab.
            controls: The sub-tab's.
            others: Other lists with names of presets, and what they offer.
        """
        form = PresetForm(self.page, view, [source for _, source in others])
        outputs = [controls.preset, *(component for component, _ in others), self.name, self.note, self.sure]
        listen(self.save.click, form.saved, [self.name, controls.text, controls.shown, self.replace], outputs)
        listen(self.rename.click, form.renamed, [controls.preset, self.name], outputs)
        listen(self.delete.click, form.asked, [controls.preset], [self.note, self.sure])
        listen(self.sure.click, form.deleted, [controls.preset], outputs)
        listen(self.upload.upload, form.imported, [self.upload], outputs)
        listen(self.export.click, form.exported, [], [self.shown, self.link])
        listen(controls.preset.input, form.chosen, [], [self.sure], quick=True)
