"""The page: its sub-tabs, and what they share."""

from __future__ import annotations

import json
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.ui.jobs import Jobs
from lib_lora.ui.markup import job_status, message
from lib_lora.ui.texts import Texts, language_of
from lib_lora.ui.versions import launch, listen, new_blocks, outputs_of
from lib_lora.ui.words import PROMPT, told_words

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import Host
    from lib_lora.ui.jobs import JobState, Slot

    View = Callable[[JobState[Any]], tuple[Any, ...]]

BROWSER = Path(__file__).parent / "browser"
"""Scripts and style; the same in the WebUI, which loads nothing of it by itself."""
TEXT_KINDS = (gr.Button, gr.DownloadButton) if hasattr(gr, "DownloadButton") else (gr.Button,)
"""Components whose words are their value."""


class Page:
    """What sub-tabs are made with.

    Attributes:
        host: The program around the page.
        texts: Words of its language.
        compiling: The line that says how the model runs.
    """

    def __init__(self, host: Host, texts: Texts, jobs: Jobs | None = None) -> None:
        self.host = host
        self.texts = texts
        self.compiling: Any = None
        self._jobs = jobs or Jobs()
        self._prompts: list[Any] = []
        self._hints: dict[str, str] = {}
        self._sources: list[tuple[Any, Callable[[], Sequence[str]]]] = []
        self._first: tuple[Callable[[], Any], list[Any]] | None = None
        self._shown: dict[Slot, tuple[Callable[[], View], Sequence[Any]]] = {}

    def slot(self, form: str) -> Slot:
        """Where a form runs its jobs; they wait for those of other forms."""
        return self._jobs.slot(form)

    def add(self, kind: Callable[..., Any], key: str, *, said_as: str = "", **options: Any) -> Any:
        """A component with words and a tooltip from the table.

        Args:
            kind: Such as ``gr.Slider``.
            key: In the table; the component's id in the page is ``prefuse-`` and the key with dashes.
            said_as: The key in the table if that is another, for controls of several forms that are called the same.
            options: As of `kind`.
        """
        identity = f"prefuse-{key.replace('.', '-').replace('_', '-')}"
        words = "value" if kind in TEXT_KINDS else "label"
        component = kind(**{words: self.texts(said_as or key)}, elem_id=identity, **options)
        component.do_not_save_to_config = True  # the WebUI would write every value into its ui-config.json
        if hint := self.texts.hint(said_as or key):
            self._hints[identity] = hint
        if PROMPT in options.get("elem_classes", ()):
            self._prompts.append(component)
        return component

    def choice(self, key: str, source: Callable[[], Sequence[str]], **options: Any) -> Any:
        """A list to choose from, which is filled when its sub-tab is opened: folders can hold thousands of files.

        Args:
            key: As of `add`.
            source: What can be chosen.
            options: As of ``gr.Dropdown``.
        """
        value = options.get("value")
        component = self.add(gr.Dropdown, key, choices=[value] if value else [], **options)
        self._sources.append((component, source))
        return component

    def loras(self, key: str, **options: Any) -> Any:
        """A list of LoRAs to choose from."""
        return self.choice(key, self.lora_names, **options)

    def lora_names(self) -> list[str]:
        """How tags name the LoRAs that can be named."""
        return sorted((entry.tag_name for entry in self.host.catalog.entries() if entry.tag_name), key=str.lower)

    @property
    def choices(self) -> list[Any]:
        """The lists of the sub-tab that is being made."""
        return [component for component, _ in self._sources]

    def refreshed(self) -> Callable[[], list[Any] | Any]:
        """Gives what can be chosen now in each of `choices`, as updates."""
        sources = [source for _, source in self._sources]

        def updates() -> list[Any] | Any:
            self.host.catalog.refresh()
            return outputs_of([gr.update(choices=[*source()]) for source in sources])

        return updates

    @contextmanager
    def sub_tab(self, key: str) -> Generator[Any]:
        """A sub-tab; its lists are filled whenever it is opened."""
        self._sources = []
        with gr.Tab(self.texts(key), elem_id=f"prefuse-tab-{key.partition('.')[2]}") as tab:
            yield tab
            if self._sources:
                listen(tab.select, self.refreshed(), (), self.choices)
                self._first = self._first or (self.refreshed(), self.choices)

    def fill(self, blocks: gr.Blocks) -> None:
        """Fill the lists of the sub-tab that is open at first."""
        if self._first is not None:
            listen(blocks.load, self._first[0], (), self._first[1])

    def run_jobs(
        self,
        event: Callable[..., Any],
        slot: Slot,
        work_of: Callable[..., Callable[[Progress], Any]],
        view: Callable[[], View],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
    ) -> Any:
        """Begin a job at an event and show it and those that wait behind it, one after the other.

        Args:
            event: Such as ``button.click``.
            slot: Where the jobs run.
            work_of: The values of `inputs` → what is to be done.
            view: Begins to show: what it gives turns how far a job is into the values of `outputs`.
            inputs: Components.
            outputs: Components.

        Returns:
            What ``then`` can be called on.
        """

        def begin(*values: Any) -> None:
            slot.start(work_of(*values))

        def follow() -> Iterator[tuple[Any, ...]]:
            yield from map(view(), slot.follow())

        self._shown[slot] = view, outputs
        # Two events, for gradio 3 lets nobody click again before the first event has ended.
        begun = listen(event, begin, inputs, quick=True)
        return listen(begun.then, follow, (), outputs)

    def find_jobs(self, blocks: gr.Blocks) -> None:
        """Show jobs that began on an earlier page, as soon as this one is opened."""
        outputs = [component for _, shown in self._shown.values() for component in shown]

        def follow() -> Iterator[list[Any]]:
            yield [gr.update()] * len(outputs)  # gradio 3 empties the outputs of what yields nothing
            found = {slot: map(view(), slot.follow()) for slot, (view, _) in self._shown.items() if slot.has_news}
            while found:
                for slot in [*found]:
                    if (values := next(found[slot], None)) is None:
                        del found[slot]
                    else:
                        yield self._updates(slot, values)

        listen(blocks.load, follow, (), outputs)

    def _updates(self, slot: Slot, values: tuple[Any, ...]) -> list[Any]:
        """Of the outputs of all forms, of which one has news."""
        return [
            value
            for one, (_, shown) in self._shown.items()
            for value in (values if one is slot else [gr.update()] * len(shown))
        ]

    def job_told(self, slot: Slot, state: JobState[Any]) -> str:
        """How far a job is, and whether others of its form wait for it."""
        waiting = slot.count("waiting") if state.phase == "running" else 0
        more = self.texts("job.queued", count=waiting) if waiting else ""
        return job_status(self.texts, state) + message(more)

    def complete_prompts(self) -> None:
        """Let the page's script have what can be written in tags, as soon as a prompt gets the focus."""
        known, told = gr.State(""), gr.HTML(elem_id="prefuse-words")
        for prompt in self._prompts:
            listen(prompt.focus, told_words(self.host, self.texts), [known], [told, known], quick=True)

    def data(self) -> str:
        """Tooltips, for the page's script."""
        return f'<div id="prefuse-hints" hidden data-hints="{escape(json.dumps(self._hints), quote=True)}"></div>'


def build(host: Host, language: str, jobs: Jobs | None = None) -> gr.Blocks:
    """The whole page.

    Args:
        host: The program around it.
        language: Of its words, or a locale; English if there is no table of it.
        jobs: Where its long jobs run; None for a queue of its own.
    """
    from lib_lora.ui import analyse, block_weights, compiling, generate, inspect, train, workshop

    page = Page(host, Texts(language_of(language)), jobs)
    with new_blocks() as blocks, gr.Column(elem_id="prefuse"):
        page.compiling = compiling.build(page)
        with gr.Tabs(elem_id="prefuse-tabs"):
            if host.can_draw:
                generate.build(page)
            block_weights.build(page)
            analyse.build(page)
            workshop.build(page)
            train.build(page)
            inspect.build(page)
        gr.HTML(f"<style>{style()}</style>{page.data()}", elem_id="prefuse-data")
        listen(blocks.load, None, js=script())
        page.complete_prompts()
        page.fill(blocks)
        page.find_jobs(blocks)
    return blocks


def open_page(blocks: gr.Blocks, host: Host, address: str, port: int) -> str:
    """Serve a page by itself.

    Args:
        blocks: As of `build`.
        host: Whose pictures it shows.
        address: To listen at.
        port: 0 for any that is free.

    Returns:
        Where it is.

    Raises:
        OSError: If the port is taken.
    """
    return launch(blocks, address=address, port=port, folders=[str(host.picture_folder)])


def script() -> str:
    """The page's scripts as a function of the browser."""
    return "() => {{ {} }}".format("\n".join(_read("*.js")))


def style() -> str:
    """The page's style."""
    return "\n".join(_read("*.css"))


def _read(pattern: str) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(BROWSER.glob(pattern))]
