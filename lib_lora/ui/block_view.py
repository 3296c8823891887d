"""What the sub-tab of block weights shows for what its controls say."""

from __future__ import annotations

from functools import lru_cache
from html import escape
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from lib_lora.core.blocks import OUTSIDE
from lib_lora.errors import PrefuseError
from lib_lora.hosts.guard import attempt, sentence
from lib_lora.preset_editor import PresetEditor
from lib_lora.prompt.block_weights import CURVES
from lib_lora.tools.analyse import BlockAnalysis, analyse_blocks
from lib_lora.tools.block_lists import LENGTHS, BlockList, shortest_text, tag_of
from lib_lora.tools.plots.weights import weights_svg
from lib_lora.ui.block_sliders import SliderRange, sliders
from lib_lora.ui.markup import copyable, message
from lib_lora.ui.plot_words import plot_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lib_lora.core.files import FileIdentity
    from lib_lora.hosts.host import Host
    from lib_lora.ui.texts import Texts

    Edit = Callable[["Form"], BlockList]

KEPT_ANALYSES = 16
FIRST_LENGTH = 17
NARROW, WIDE = (0.0, 1.0), (-1.0, 2.0)
"""Ends of the sliders."""
MANY_BLOCKS = 30
LARGE_PLOT, PLOT = 960.0, 560.0
"""Width in pixels, of many blocks and of others."""
LEAST_OUTSIDE = 0.005
"""Of the LoRA's change, that is worth a word."""


class Form(NamedTuple):
    """What the controls say.

    Attributes:
        lora: How tags name the LoRA; None for none.
        length: Of the list: a number in `LENGTHS` counted from 1; 0 for what the LoRA needs.
        is_wide: Whether sliders go beyond 0 and 1.
        preset: The name that was chosen last.
        text: The list, or the name of a preset or a curve.
        strength: Of the tag.
        shown: The sliders that are there.
    """

    lora: str | None
    length: int | None
    is_wide: bool
    preset: str | None
    text: str
    strength: float | None
    shown: SliderRange


class Updates(NamedTuple):
    """What becomes of the controls; by default they stay as they are. Gradio 3 wants a plain tuple of them."""

    text: Any = gr.update()
    sliders: Any = gr.update()
    plot: Any = gr.update()
    note: Any = gr.update()
    tag: Any = gr.update()
    shown: Any = gr.update()


class BlockView:
    """Answers to what is done in the sub-tab. LoRAs are read once and their analyses kept."""

    def __init__(self, host: Host, texts: Texts) -> None:
        self._host = host
        self._texts = texts
        self._words = plot_words(texts)
        self._serial = count()
        self._analysed = lru_cache(KEPT_ANALYSES)(_analysed)

    def names(self) -> list[str]:
        """Presets, the user's own first, and curves."""
        own = PresetEditor(self._host.presets.folders).own()
        return [*dict.fromkeys([*own, *self._host.presets.read().weights, *CURVES])]

    def first(self) -> Updates:
        """What is shown before anything is chosen."""
        blocks = BlockList.of(1.0, FIRST_LENGTH)
        form = Form(None, 0, False, None, blocks.text, 1.0, SliderRange(0))
        return self._shown(form, blocks, [], is_new=True)

    def typed(self, *values: Any) -> Updates:
        """The list was typed, or written by a slider: the curve follows; the sliders do if they can not show it."""
        form = Form(*values)
        notes: list[str] = []
        blocks = self._tried(lambda: self._read(form), notes)
        return self._shown(form, blocks, notes, is_new="," not in form.text)._replace(text=gr.update())

    def edited(self, edit: Edit, *values: Any) -> Updates:
        """A button, a preset, or another length of the list."""
        form = Form(*values)
        notes: list[str] = []
        blocks = self._tried(lambda: edit(form), notes)
        return self._shown(form, blocks, notes, is_new=True)

    def reading(self, lora: str | None) -> str:
        """What is told while a LoRA is looked at, which can take a second."""
        return message(self._texts("blocks.reading")) if lora else ""

    def same(self, weight: float) -> Edit:
        """All blocks alike."""
        return lambda form: BlockList.of(weight, self._length(form))

    def inverted(self, form: Form) -> BlockList:
        """1 - weight."""
        return self._read(form).inverted()

    def resized(self, form: Form) -> BlockList:
        """The list that the LoRA or the user wants."""
        return self._read(form).resized(self._length(form))

    def loaded(self, form: Form) -> BlockList:
        """The preset or curve that was chosen."""
        name = form.preset or form.text
        return BlockList.read(name, self._host.presets.read(), self._length(form))

    def unchanged(self, form: Form) -> BlockList:
        """What is there."""
        return self._read(form)

    def tag(self, form: Form, weights: str | None = None) -> str:
        """The tag of the chosen LoRA; ``""`` for none.

        Args:
            form: What the controls say.
            weights: Value of ``lbw``; None for the shortest that the list has.

        Raises:
            PrefuseError: If there is no such LoRA any more, or the weights can not be read.
        """
        if not form.lora:
            return ""
        if weights is None:
            weights = self._shortest(form, self._read(form))
        return tag_of(self._host.catalog.find(form.lora).tag_name, _strength(form), weights)

    def list_text(self, text: str, shown: SliderRange) -> str:
        """The list that a list, a preset or a curve stands for, as a preset file holds it.

        Raises:
            TagError: If it can not be read.
        """
        return BlockList.read(text, self._host.presets.read(), shown.blocks).text

    def _read(self, form: Form) -> BlockList:
        return BlockList.read(form.text, self._host.presets.read(), self._length(form))

    def _length(self, form: Form) -> int:
        if form.length:
            return LENGTHS[form.length - 1]
        analysis = self._analysis(form, [])
        return (analysis.length if analysis else None) or form.shown.blocks

    def _analysis(self, form: Form, notes: list[str]) -> BlockAnalysis | None:
        """Of the chosen LoRA; if it can not be read, None, and a sentence among `notes`."""
        if not form.lora:
            return None
        name = form.lora
        entry = self._tried(lambda: self._host.catalog.find(name), notes)
        if entry is None:
            return None
        analysis, error = self._analysed(entry.identity)
        notes += [message(sentence(error), "refused")] if error else []
        return analysis

    def _shortest(self, form: Form, blocks: BlockList) -> str:
        analysis = self._analysis(form, [])
        present = [block for block in analysis.present if block != OUTSIDE] if analysis else None
        return shortest_text(blocks, self._host.presets.read(), present, form.preset or "")

    def _shown(self, form: Form, blocks: BlockList | None, notes: list[str], *, is_new: bool) -> Updates:
        """Everything for some weights.

        Args:
            form: What the controls say.
            blocks: The weights; None if they can not be read.
            notes: What is told besides.
            is_new: Whether the sliders and the list have to follow.
        """
        analysis = self._analysis(form, notes)
        if blocks is None:
            return Updates(note=_answer(form.text, notes))
        needed = SliderRange.of(blocks.weights, *(WIDE if form.is_wide else NARROW))
        notes += map(message, self._notes(blocks, analysis))
        shares = analysis.block_shares() if analysis else None
        width = LARGE_PLOT if needed.blocks > MANY_BLOCKS else PLOT
        plot = self._tried(lambda: weights_svg([*blocks.items], blocks.weights, shares, width, self._words), notes)
        tag = self._tried(lambda: self._tag_of(form, blocks), notes) or ""
        tag = copyable(self._texts, tag) if tag else message(self._texts("blocks.no_tag"))
        updates = Updates(plot=plot or gr.update(), note=_answer(form.text, notes), tag=tag)
        if is_new:
            updates = updates._replace(text=blocks.text)
        if is_new or not form.shown.holds(needed):
            updates = updates._replace(sliders=sliders(self._texts, blocks, needed, next(self._serial)), shown=needed)
        return updates

    def _tag_of(self, form: Form, blocks: BlockList) -> str:
        return tag_of(form.lora, _strength(form), self._shortest(form, blocks)) if form.lora else ""

    def _notes(self, blocks: BlockList, analysis: BlockAnalysis | None) -> Iterator[str]:
        if blocks.drawn:
            yield self._texts("blocks.drawn", letters=", ".join(blocks.drawn))
        if analysis is None:
            return
        if analysis.length is None:
            yield self._texts("blocks.nameless", family=analysis.base_model)
        shares = analysis.block_shares()
        outside = sum(share for block, share in shares.items() if block not in blocks.items and block != OUTSIDE)
        if outside > LEAST_OUTSIDE:
            yield self._texts("blocks.outside", percent=f"{100 * outside:.0f}", count=len(blocks.items))
        yield from analysis.notes

    def _tried(self, action: Callable[[], Any], notes: list[str]) -> Any:
        """Result, or None and a sentence among `notes`."""
        result, error = attempt("block weights", action)
        notes += [message(sentence(error), "refused")] if error else []
        return result


def _analysed(identity: FileIdentity) -> tuple[BlockAnalysis | None, Exception | None]:
    return attempt("the analysis of a LoRA", lambda: analyse_blocks(identity.path))


def _answer(text: str, notes: list[str]) -> str:
    """The notes, with what they are an answer to: a slider waits for it before it asks again."""
    return f'<div data-prefuse-answer="{escape(text, quote=True)}">{"".join(dict.fromkeys(notes))}</div>'


def _strength(form: Form) -> float:
    if form.strength is None:
        raise PrefuseError("there is no strength; write a number such as 0.8")
    return float(form.strength)
