"""Where any exception of ours ends: the traceback goes to the log, a sentence to the user."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from lib_lora.errors import PrefuseError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("prefuse")

T = TypeVar("T")


def attempt(what: str, action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Result and fault of `action`, one of which is None.

    A fault of ours is a sentence already; of any other the traceback is logged.

    Args:
        what: What is done, for the log.
        action: What may fail.
    """
    try:
        return action(), None
    except PrefuseError as error:
        return None, error
    except Exception as error:
        logger.exception("Prefuse: %s failed", what)
        return None, error


def sentence(error: Exception) -> str:
    """What the user is told of an exception."""
    if isinstance(error, PrefuseError):
        return str(error)
    return f"{type(error).__name__}: {error} (see the console)"
