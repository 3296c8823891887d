"""Trying what can fail in any way: compilers raise whatever their many parts raise."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lib_lora.core.memory import OUT_OF_MEMORY
from lib_lora.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """What went wrong.

    Attributes:
        reason: A clause.
        is_general: Whether it would go wrong with every other block too: memory is short, or we refused.
        is_stale: Whether there was no graph for the call, and one can be made.
    """

    reason: str
    is_general: bool = False
    is_stale: bool = False


class NoGraphError(RuntimeError):
    """torch has compiled nothing that serves a call."""


def attempt(action: Callable[[], Result]) -> Result | Failure:
    """The result of `action`, or why there is none; the traceback goes to the log."""
    try:
        return action()
    except Exception as error:
        logger.info("compiled code failed", exc_info=True)
        return _failure(error)


def _failure(error: Exception) -> Failure:
    for cause in _causes(error):
        if isinstance(cause, CompileError):
            return Failure(str(cause), is_general=True)
        if isinstance(cause, OUT_OF_MEMORY):
            return Failure(f"memory ran out: {_first_line(cause)}", is_general=True)
    return Failure(_first_line(error), is_stale=isinstance(error, NoGraphError))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what torch wrapped in it."""
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, "inner_exception", None) or error.__context__


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split("\n\n")[0].split())
    return text[:300] or type(error).__name__
