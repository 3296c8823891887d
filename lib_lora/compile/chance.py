"""torch's random numbers while something is compiled beside a thread that draws a picture.

Its compilers note the state of these numbers, and put it back when they are done (dynamo's `preserve_global_state`, for
one): what the other thread drew meanwhile would come once more, in another picture than the one of its seed.
"""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_NAME = "set_rng_state"
_PLACES = (torch.random, torch.cuda)
"""Modules by whose `set_rng_state` compilers put the state back."""
_lock = threading.Lock()
_compiling: set[int] = set()
"""Threads, by their identity."""
_replaced: list[tuple[Any, Callable[..., None], Callable[..., None]]] = []
"""Module, its own function, and ours."""


@contextmanager
def chance_left_alone() -> Generator[None]:
    """What this thread does, does not put torch's random numbers back."""
    with _lock:
        if not _compiling:
            _replaced.extend(map(_replace, _PLACES))
        _compiling.add(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            _compiling.discard(threading.get_ident())
            while _replaced and not _compiling:
                _put_back(*_replaced.pop())


def _replace(place: Any) -> tuple[Any, Callable[..., None], Callable[..., None]]:
    own: Callable[..., None] = getattr(place, _NAME)

    @functools.wraps(own)
    def ours(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() not in _compiling:
            own(*args, **kwargs)

    setattr(place, _NAME, ours)
    return place, own, ours


def _put_back(place: Any, own: Callable[..., None], ours: Callable[..., None]) -> None:
    if getattr(place, _NAME) is ours:
        setattr(place, _NAME, own)
