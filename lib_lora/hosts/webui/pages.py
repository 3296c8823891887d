"""Pages that go while an event of theirs runs: the WebUI's server must not wait for them.

gradio 3 keeps a task for each queued event until it has closed the event's socket. Where an event is a generator, as
those that follow our jobs, it forgets to if it could not reach the page in between: the page was closed, or the server
closes, which ends the sockets first. Such a task stays for good, and "Reload UI", which waits for all tasks, with it.
"""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from modules import patches

OWNER = "prefuse"
METHOD = "process_events"


def close_what_has_ended() -> None:
    """Close the socket of each queued event that has ended."""
    from gradio.queueing import Queue
    from starlette.websockets import WebSocketState

    leave_open()

    async def process_events(queue: Any, events: list[Any], batch: bool) -> None:
        try:
            await original(queue, events, batch)
        finally:
            for event in events:
                if event.websocket.application_state is not WebSocketState.DISCONNECTED:
                    with suppress(Exception):  # whatever the socket of a page that is gone raises
                        await event.disconnect()

    original = patches.patch(OWNER, Queue, METHOD, process_events)


def leave_open() -> None:
    """The method of gradio again."""
    queue = getattr(sys.modules.get("gradio.queueing"), "Queue", None)
    if patches.original(OWNER, queue, METHOD) is not None:
        patches.undo(OWNER, queue, METHOD)
