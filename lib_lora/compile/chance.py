"""Random numbers while something is compiled beside a thread that draws a picture.

torch's compilers note the state of its numbers and of Python's, and put it back when they are done: what the other
thread drew meanwhile would come once more. A picture would not be the one of its seed, and the next "random" seed would
be the same again.
"""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import ModuleType

_SETTERS = ((torch.random, "set_rng_state"), (torch.cuda, "set_rng_state"), (random, "setstate"))
"""Modules, and the functions of theirs by which compilers put the state back."""


class _Replaced:
    """A function of a module that does nothing in threads that compile."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self._module, self._name = module, name
        self._own: Callable[..., None] = getattr(module, name)
        self._ours = self._set
        setattr(module, name, self._ours)

    def put_back(self) -> None:
        """The module's own again, unless somebody put another over ours."""
        if getattr(self._module, self._name) is self._ours:
            setattr(self._module, self._name, self._own)

    def _set(self, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() not in _compiling:
            self._own(*args, **kwargs)


_lock = threading.Lock()
_compiling: set[int] = set()
"""Threads, by their identity."""
_replaced: list[_Replaced] = []


@contextmanager
def chance_left_alone() -> Generator[None]:
    """What this thread does, does not put random numbers back to where they were."""
    with _lock:
        if not _compiling:
            _replaced.extend(_Replaced(*setter) for setter in _SETTERS)
        _compiling.add(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            _compiling.discard(threading.get_ident())
            while _replaced and not _compiling:
                _replaced.pop().put_back()
