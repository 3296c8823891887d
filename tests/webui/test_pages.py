"""Pages that go while an event of theirs runs, with the server that the WebUI has."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.webui import stand_in

websockets = pytest.importorskip("starlette.websockets")


class Queue:
    """The one of gradio, which closes the sockets of the pages that it could reach to the last."""

    async def process_events(self, events, batch):
        for event in events:
            if event.is_there:
                await event.disconnect()
        if batch:
            raise OSError("the server is closed")


class Event:
    """One that is processed, with its page's socket."""

    def __init__(self, *, is_there, fault=None):
        self.is_there, self.fault = is_there, fault
        self.closed = 0
        self.websocket = SimpleNamespace(application_state=websockets.WebSocketState.CONNECTED)

    async def disconnect(self):
        self.closed += 1
        self.websocket.application_state = websockets.WebSocketState.DISCONNECTED
        if self.fault:
            raise self.fault


@pytest.fixture
def pages(fake_modules, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio.queueing", SimpleNamespace(Queue=Queue))
    from lib_lora.hosts.webui import pages

    yield pages
    pages.leave_open()


def process(*events, batch=False):
    asyncio.run(Queue().process_events(list(events), batch))


def test_the_sockets_of_all_pages_are_closed_once_when_their_events_have_ended(pages):
    events = [Event(is_there=True), Event(is_there=False), Event(is_there=False, fault=RuntimeError("gone"))]
    process(*events)
    assert [event.closed for event in events] == [1, 0, 0]
    pages.close_what_has_ended()
    events = [Event(is_there=True), Event(is_there=False), Event(is_there=False, fault=RuntimeError("gone"))]
    process(*events)
    assert [event.closed for event in events] == [1, 1, 1]


def test_they_are_closed_too_if_the_event_fails_and_the_fault_comes_through(pages):
    pages.close_what_has_ended()
    event = Event(is_there=False)
    with pytest.raises(OSError, match="the server is closed"):
        process(event, batch=True)
    assert event.closed == 1


def test_gradio_is_as_it_was_after_reloads(pages):
    before = Queue.process_events
    for _ in range(3):
        pages.close_what_has_ended()
        assert Queue.process_events is not before
    pages.leave_open()
    pages.leave_open()
    assert Queue.process_events is before


def test_the_stand_in_leaves_the_gradio_that_was_there(monkeypatch):
    there = ModuleType("gradio")
    monkeypatch.setitem(sys.modules, "gradio", there)
    for _ in stand_in.imported():
        import gradio

        assert gradio is not there
    assert sys.modules["gradio"] is there
