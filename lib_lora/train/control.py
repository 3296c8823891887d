"""What the user wants of a training that runs: that it goes on, waits, or ends after this step."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

from lib_lora.core.saving import remove_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Wish(IntEnum):
    """Of several processes' wishes the largest counts."""

    GO = 0
    PAUSE = 1
    STOP = 2


Wishes: TypeAlias = "Callable[[], Wish]"
"""Asked after each step, and again and again while the training waits."""


def go() -> Wish:
    """Nobody wants anything else."""
    return Wish.GO


class SignalFiles:
    """Files that tell a training what to do: ``NAME.pause`` lets it wait while it is there, ``NAME.stop`` ends it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._pause, self._stop = folder / f"{name}.pause", folder / f"{name}.stop"

    def wish(self) -> Wish:
        """What they say."""
        return Wish.STOP if self._stop.exists() else Wish.PAUSE if self._pause.exists() else Wish.GO

    def forget_stop(self) -> None:
        """Remove the file that ends a training, so that the next one is not ended by it."""
        if self._stop.exists():
            remove_file(self._stop)
