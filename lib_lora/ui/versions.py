"""Where gradio 3.41.2 (the WebUI's) and newest gradio want to be told the same in different ways."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.themes import Default

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODERN = int(gr.__version__.split(".")[0]) > 3
FONTS = ("system-ui", "sans-serif")
MONO_FONTS = ("ui-monospace", "monospace")
CONCURRENT = 16
"""Events that gradio 3 answers at a time; a job takes one as long as it runs."""


def listen(
    event: Callable[..., Any],
    action: Callable[..., Any] | None,
    inputs: Sequence[Any] = (),
    outputs: Sequence[Any] = (),
    *,
    js: str | None = None,
    quick: bool = False,
) -> Any:
    """Call `action` at an event of a component.

    Args:
        event: Such as ``button.click``.
        action: Gets the values of `inputs`, returns or yields those of `outputs`; None if `js` does it all.
        inputs: Components.
        outputs: Components.
        js: A function of the browser that is called before.
        quick: For what answers at once and may be asked again before it did: the last question counts.

    Returns:
        What the event gives, on which ``then`` can be called.
    """
    options: dict[str, Any] = {"js" if MODERN else "_js": js, "show_progress": "hidden", "api_name": False}
    if quick or action is None:
        options["queue"] = False
    if MODERN:
        options |= {"concurrency_limit": None, "trigger_mode": "always_last" if quick else "multiple"}
    return event(None if action is None else _unannotated(action), list(inputs), list(outputs), **options)


def outputs_of(values: Sequence[Any]) -> Any:
    """What an action returns for as many outputs; gradio takes a list for the value of a single one."""
    return values if len(values) != 1 else values[0]


def text_event(box: Any) -> Callable[..., Any]:
    """The event that tells of everything that a user does to a text box.

    Newest gradio tells of an input only after keys, not of what was pasted, deleted, or written by a script; its change
    tells of what an action wrote, too.
    """
    return box.change if MODERN else box.input


def _unannotated(action: Callable[..., Any]) -> Callable[..., Any]:
    """The same without annotations: gradio 3 evaluates them, and some names are imported for types alone."""
    if inspect.isgeneratorfunction(action):

        def generator(*values: Any) -> Any:
            yield from action(*values)

        generator.__annotations__ = {}
        return generator

    def function(*values: Any) -> Any:
        return action(*values)

    function.__annotations__ = {}
    return function


def uploaded(value: Any) -> Path:
    """The file that an upload brought: gradio 3 gives it as an open one."""
    return Path(getattr(value, "name", value))


def new_blocks() -> gr.Blocks:
    """An empty page that asks no other computer for anything."""
    return gr.Blocks(title="Prefuse", analytics_enabled=False, **({} if MODERN else _look()))


def launch(blocks: gr.Blocks, *, address: str, port: int, folders: Sequence[str]) -> str:
    """Serve the page.

    Args:
        blocks: The page.
        address: To listen at.
        port: 0 for any that is free.
        folders: Whose files the page may show.

    Returns:
        Its address.

    Raises:
        OSError: If the port is taken.
    """
    options: dict[str, Any] = {"server_name": address, "quiet": True, "prevent_thread_lock": True, "share": False}
    options |= {"server_port": port or None, "allowed_paths": [*folders], "inbrowser": False}
    if MODERN:
        options |= {**_look(), "ssr_mode": False, "footer_links": []}
    else:
        options |= {"show_api": False}
        queue: dict[str, Any] = {"api_open": False, "concurrency_count": CONCURRENT}
        blocks.queue(**queue)
    return blocks.launch(**options)[1]


def _look() -> dict[str, Any]:
    """The usual one, without fonts that would come from the network."""
    return {"theme": Default(font=FONTS, font_mono=MONO_FONTS)}
