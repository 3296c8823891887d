"""The line that says how the model runs; the page's script has it looked at anew as long as something is compiled."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_lora.compile.choose import OFF
from lib_lora.ui.versions import listen

if TYPE_CHECKING:
    from lib_lora.compile.protocol import CompileStatus
    from lib_lora.ui.page import Page
    from lib_lora.ui.texts import Texts

SEPARATOR = " · "


def build(page: Page) -> Any:
    """Put the line on the page that is being made, and a button behind the scenes that fills it."""
    line = gr.HTML(elem_id="prefuse-compiling")
    look = page.add(gr.Button, "compiling.look")
    listen(look.click, lambda: told(page), (), [line], quick=True)
    return line


def told(page: Page) -> str:
    """The line as it is now, empty where nothing is compiled, nor was to be; marked where it may change by itself."""
    words = compile_words(page.texts, page.host.compile_status())
    live = " data-live" if page.host.compiler() != OFF else ""
    note = f'<div class="prefuse-note" role="status">{escape(words)}</div>' if words else ""
    return f"<div{live}>{note}</div>"


def compile_words(texts: Texts, status: CompileStatus) -> str:
    """What is compiled, how far that is, what the last switch cost, recompiles, and why something runs eagerly."""
    if not status.blocks:
        return status.reason
    parts = [texts("compiling.blocks", backend=status.backend, done=len(status.compiled), of=status.blocks)]
    if status.done < status.asked:
        parts.append(texts("compiling.warming", percent=f"{100 * status.progress:.0f}"))
    if status.switches:
        parts.append(texts("compiling.switch", milliseconds=f"{status.switch_ms:.1f}"))
    parts.append(texts("compiling.recompiles", count=status.recompiles))
    return SEPARATOR.join(filter(None, (*parts, status.reason)))
