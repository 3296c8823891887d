"""Who copies base weights into the live ones, before products are added to them there."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    Copies = Callable[[], None]


class Lane(Protocol):
    """Takes copies in the order in which they will be needed."""

    def submit(self, copies: Copies) -> Copies:
        """Do this some time before it is waited for; returns what waits for it."""
        ...


class InOrder:
    """Copies when they are waited for: they come from the same memory, and the weights are in its cache then."""

    def submit(self, copies: Copies) -> Copies:
        """Not yet."""
        return copies


class SecondStream:
    """Copies at once, on a stream of its own: the transfer of some weights runs while products of others are made.

    The products' stream waits for an event of each transfer; the transfers wait for all that was asked before of the
    products' stream, which may read the weights still; and what is asked of it later waits for all transfers. So no
    memory is freed or read too early, whatever happens in between.
    """

    def __init__(self, stream: torch.cuda.Stream, main: torch.cuda.Stream) -> None:
        self._stream = stream
        self._main = main

    def submit(self, copies: Copies) -> Copies:
        """Now."""
        with torch.cuda.stream(self._stream):
            copies()
            done = self._stream.record_event()
        return lambda: self._main.wait_event(done)


@contextmanager
def second_stream(stream: torch.cuda.Stream, device: torch.device) -> Generator[SecondStream]:
    """A lane beside the current stream of a device, which waits for all of it in the end."""
    main = torch.cuda.current_stream(device)
    stream.wait_stream(main)
    try:
        yield SecondStream(stream, main)
    finally:
        main.wait_stream(stream)
