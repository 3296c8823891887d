"""The sub-tab that shows where in a LoRA its change lies, from the file alone and in pictures."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import partial
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.errors import JobError
from lib_lora.hosts.guard import attempt, sentence
from lib_lora.hosts.host import SIZE_STEP
from lib_lora.tools.analyse import analyse_blocks
from lib_lora.tools.analyse_pictures import NONE, WHOLE
from lib_lora.tools.plots.bars import draw_changes
from lib_lora.tools.plots.heat import draw_heat
from lib_lora.tools.table import ENCODING
from lib_lora.ui.block_series import Series
from lib_lora.ui.exports import save_exports
from lib_lora.ui.generate import MOST_PIXELS, MOST_STEPS
from lib_lora.ui.inspection import plot_panel
from lib_lora.ui.latest import Latest
from lib_lora.ui.loaded import loaded_model
from lib_lora.ui.markup import job_status, message
from lib_lora.ui.plot_words import plot_words
from lib_lora.ui.versions import listen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from PIL.Image import Image

    from lib_lora.core.saving import Progress
    from lib_lora.tools.analyse import BlockAnalysis
    from lib_lora.tools.analyse_pictures import Change, PictureAnalysis
    from lib_lora.tools.plots.style import Plot
    from lib_lora.tools.plots.words import Words
    from lib_lora.ui.jobs import JobState, Slot
    from lib_lora.ui.page import Page

THUMBNAIL = 320
"""Longest side in the page, in pixels."""
DEFAULT_STEPS = 8


@dataclass(frozen=True)
class Analysed:
    """What is kept of the LoRA that is shown.

    Attributes:
        tag_name: How a tag names it.
        analysis: Where its change lies.
    """

    tag_name: str
    analysis: BlockAnalysis

    def plot(self, words: Words) -> Plot:
        """Its heat map.

        Raises:
            JobError: If there is nothing to draw, or matplotlib is not installed.
        """
        if not self.analysis.cells:
            raise JobError(f"{self.tag_name} changes no layer")
        return draw_heat(self.analysis.shares, self.analysis.present, self.analysis.elements, words=words)


def build(page: Page) -> None:
    """Put the sub-tab on the page that is being made."""
    with page.sub_tab("tab.analyse"):
        shown = gr.State()
        with gr.Row():
            lora = page.loras("analyse.lora", scale=3)
            export = page.add(gr.Button, "analyse.export")
            stop = page.add(gr.Button, "analyse.stop")
        status = gr.HTML()
        files = page.add(gr.File, "analyse.files", file_count="multiple", interactive=False, visible=False)
        heat = gr.HTML(elem_id="prefuse-analyse-heat")
        blocks = _build_pictures(page, shown)
        slot = page.slot("analyse")
        latest = Latest(slot)

        def analyse(name: str) -> Iterator[tuple[Any, ...]]:
            for state in latest.run(lambda _: _analysed(page, name)):
                told = gr.update() if state is None else job_status(page.texts, state)
                found = (gr.update(),) * 4
                if state is not None and state.result is not None:
                    found = (state.result, _heat(page, state.result), _choices(state.result), gr.update(visible=False))
                yield (told, *found)

        def save(analysed: Analysed | None) -> tuple[Any, Any]:
            paths, error = attempt("an export of the page", lambda: _save_heat(page, analysed))
            return _exported(page, paths) if error is None else (message(sentence(error), "refused"), gr.update())

        listen(lora.input, analyse, [lora], [status, shown, heat, blocks, files])
        listen(export.click, save, [shown], [status, files])
        listen(stop.click, slot.cancel, quick=True)


def _build_pictures(page: Page, shown: Any) -> Any:
    """The form below, which draws; gives back its choice of blocks."""
    slot = page.slot("analyse.pictures")
    gr.HTML(f"<h3>{escape(page.texts('analyse.pictures'))}</h3>")
    with gr.Row():
        with gr.Column(scale=3):
            prompt = page.add(gr.Textbox, "analyse.prompt", lines=2, elem_classes=["prefuse-prompt"])
            blocks = page.add(gr.CheckboxGroup, "analyse.blocks", choices=[])
        with gr.Column(scale=1, min_width=160):
            start = page.add(gr.Button, "analyse.start", variant="primary", elem_classes=["prefuse-start"])
            interrupt = page.add(gr.Button, "analyse.interrupt")
    settings = _settings(page)
    status = gr.HTML()
    files = page.add(gr.File, "analyse.sheet", file_count="multiple", interactive=False, visible=False)
    pictures = gr.HTML(elem_id="prefuse-analyse-pictures")

    page.run_jobs(
        start.click,
        slot,
        partial(_work_of, page, slot),
        lambda: _View(page, slot).shown,
        [shown, prompt, blocks, *settings],
        [status, pictures, files],
    )
    listen(interrupt.click, slot.cancel, quick=True)
    return blocks


class _View:
    """What one page is shown of pictures, while others are made."""

    def __init__(self, page: Page, slot: Slot) -> None:
        self._page = page
        self._slot = slot
        self._seen = (0, 0)

    def shown(self, state: JobState[tuple[PictureAnalysis, list[Path]]]) -> tuple[Any, ...]:
        """State, pictures and files."""
        page, made = self._page, self._slot.kept or []
        told, shown, saved = page.job_told(self._slot, state), gr.update(), gr.update()
        if self._seen != (seen := (id(made), len(made))):
            shown, self._seen = _grid(_picture(page, *one) for one in [*made]), seen
        if state.result is not None:
            found, paths = state.result
            note, saved = _exported(page, paths)
            told, shown = told + note, _found(page, found)
        return told, shown, saved


def _work_of(
    page: Page, slot: Slot, analysed: Analysed | None, prompt: str, chosen: list[str], *values: Any
) -> Callable[[Progress], tuple[PictureAnalysis, list[Path]]]:
    """What is to be done of a form; pictures are kept in the slot as soon as they are there."""

    def work(progress: Progress) -> tuple[PictureAnalysis, list[Path]]:
        if analysed is None:
            raise JobError(page.texts("analyse.choose"))
        slot.kept = made = list["tuple[str, Image]"]()
        series = Series.of(analysed.tag_name, analysed.analysis, chosen, *values)
        found = series.draw(page.host, prompt, made, progress)
        return found, _save_pictures(page, analysed, found)

    return work


def _settings(page: Page) -> list[Any]:
    """As `Series.of` takes them."""
    with gr.Row():
        ways = [(page.texts(f"analyse.mode.{mode}"), mode) for mode in ("only", "without")]
        mode = page.add(gr.Radio, "analyse.mode", choices=ways, value="only")
        strength = page.add(gr.Slider, "analyse.strength", minimum=-2, maximum=2, value=1, step=0.05)
        seed = page.add(gr.Number, "analyse.seed", value=1, precision=0)
    with gr.Row():
        steps = page.add(gr.Slider, "analyse.steps", minimum=1, maximum=MOST_STEPS, value=DEFAULT_STEPS, step=1)
        sizes: dict[str, Any] = {"minimum": 0, "maximum": MOST_PIXELS, "value": 0, "step": SIZE_STEP}
        width, height = (page.add(gr.Slider, f"analyse.{side}", **sizes) for side in ("width", "height"))
    return [mode, strength, seed, steps, width, height]


def _analysed(page: Page, name: str) -> Analysed:
    entry = page.host.catalog.find(name)
    return Analysed(entry.tag_name, analyse_blocks(entry.path, loaded_model(page.host)))


def _heat(page: Page, analysed: Analysed) -> str:
    """Its heat map and what could not be told."""
    drawn = plot_panel(lambda: analysed.plot(plot_words(page.texts)))
    return drawn + "".join(message(note) for note in analysed.analysis.notes)


def _choices(analysed: Analysed) -> Any:
    return gr.update(choices=[*analysed.analysis.present], value=[])


def _save_heat(page: Page, analysed: Analysed | None) -> list[Path]:
    """Raises: JobError: If no LoRA was looked at, or there is nothing to draw."""
    if analysed is None:
        raise JobError(page.texts("analyse.choose"))
    contents = {".csv": _csv(analysed.analysis.to_csv()), ".png": analysed.plot(plot_words(page.texts)).png()}
    return save_exports(page.host.picture_folder, f"shares-{analysed.tag_name}", contents)


def _save_pictures(page: Page, analysed: Analysed, found: PictureAnalysis) -> list[Path]:
    sheet = BytesIO()
    found.grid().save(sheet, "png")
    contents = {".csv": _csv(found.to_csv()), ".png": sheet.getvalue()}
    return save_exports(page.host.picture_folder, f"blocks-{analysed.tag_name}", contents)


def _exported(page: Page, paths: list[Path] | None) -> tuple[str, Any]:
    """A line about where files were saved, and they themselves."""
    files = [str(path) for path in paths or ()]
    return message(page.texts("analyse.saved", files=", ".join(files))), gr.update(value=files, visible=True)


def _found(page: Page, found: PictureAnalysis) -> str:
    """A bar for each block, then the pictures over their differences."""
    title = page.texts(f"analyse.changes.{found.mode}")
    changes = {change.block: change.rms for change in found.changes}
    drawn = plot_panel(lambda: draw_changes(changes, title))
    note = message(page.texts("analyse.brighter", factor=f"{found.brighter:.3g}"))
    figures = [_picture(page, NONE, found.base), *(_change(page, one) for one in (found.whole, *found.changes))]
    return drawn + note + _grid(figures)


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="prefuse-pictures">{"".join(figures)}</div>'


def _picture(page: Page, block: str, picture: Image) -> str:
    """One that is not compared."""
    words = _name(page, block)
    return f"<figure>{_image(picture, words)}<figcaption>{escape(words)}</figcaption></figure>"


def _change(page: Page, change: Change) -> str:
    """A picture over its difference."""
    words = f"{_name(page, change.block)} · RMS {change.rms:.3g} · {change.differing:.1%}"
    images = _image(change.picture, words) + _image(change.difference, words)
    return f"<figure>{images}<figcaption>{escape(words)}</figcaption></figure>"


def _name(page: Page, block: str) -> str:
    """A block's, or words for the pictures that no block is named after."""
    return {NONE: page.texts("analyse.none"), WHOLE: page.texts("analyse.whole")}.get(block, block)


def _image(picture: Image, words: str) -> str:
    return f'<img src="{_data_url(picture)}" alt="{escape(words)}">'


def _data_url(picture: Image) -> str:
    """A small one, for the page alone."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = BytesIO()
    small.save(data, "png")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _csv(text: str) -> bytes:
    return text.encode(ENCODING, "replace")
