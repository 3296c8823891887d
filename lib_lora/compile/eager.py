"""No compilation: what is asked for with ``off``, and what is left when a backend can not work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.compile.protocol import CompileStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from lib_lora.core.layers import LayerRef


class EagerHandle:
    """Does nothing to a model.

    Attributes:
        status: Always the same.
    """

    def __init__(self, reason: str = "") -> None:
        self.status = CompileStatus(reason=reason)

    def weights_changed(self, layers: Sequence[LayerRef]) -> None:
        """Nothing was derived from the weights."""

    def pause(self, clause: str) -> None:
        """It is eager."""

    def wait(self, seconds: float | None = None) -> bool:
        """There is nothing to wait for."""
        return True

    def release(self) -> None:
        """Nothing was changed."""


class Eager:
    """The model as it is.

    Attributes:
        name: ``eager``.
    """

    name = "eager"

    def prepare(self, model: nn.Module) -> EagerHandle:
        """Nothing to prepare."""
        return EagerHandle()
