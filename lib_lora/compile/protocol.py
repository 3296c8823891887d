"""What a host knows of compiled models: one verb to begin, a handle, its status."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from lib_lora.core.layers import LayerRef


@dataclass(frozen=True)
class CompileStatus:
    """How a model runs now.

    Attributes:
        backend: ``eager``, ``inductor`` or ``tensorrt``.
        blocks: How many blocks of the model the backend took on.
        compiled: Names of those that run compiled.
        asked: Forms of calls that were met (block by block: shapes, dtypes), each of which is compiled or warmed up.
        done: Those of them that are ready, or were given up.
        recompiles: Calls that were answered eagerly though their form had been compiled, and compiled anew, as a switch
            must never make one.
        switches: Changes of weights that were told.
        switch_ms: What the last of them cost the compiled blocks, in milliseconds.
        reason: Why a part or all of it runs eagerly: a sentence, or ``""``.
    """

    backend: str = "eager"
    blocks: int = 0
    compiled: tuple[str, ...] = ()
    asked: int = 0
    done: int = 0
    recompiles: int = 0
    switches: int = 0
    switch_ms: float = 0.0
    reason: str = ""

    @property
    def progress(self) -> float:
        """Part of what is to be compiled that is done, 0 to 1."""
        return self.done / self.asked if self.asked else 0.0

    def __str__(self) -> str:
        """One or two sentences."""
        if not self.blocks:
            return self.reason or "not compiled"
        warming = f", warm-up at {self.progress:.0%}" if self.done < self.asked else ""
        switch = f", last switch {self.switch_ms:.1f} ms" if self.switches else ""
        line = f"{self.backend}: {len(self.compiled)} of {self.blocks} blocks compiled{warming}{switch}"
        return f"{line}, {self.recompiles} recompiles{f'. {self.reason}' if self.reason else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"progress": self.progress}


class Handle(Protocol):
    """A model that was prepared."""

    @property
    def status(self) -> CompileStatus:
        """How it runs now."""
        ...

    def weights_changed(self, layers: Sequence[LayerRef]) -> None:
        """To be called after weights were written, before the next picture: `LoraSession`'s ``on_weights_changed``."""
        ...

    def pause(self, clause: str) -> None:
        """Compute eagerly as long as something changes what the model's parts do; ``""`` ends that.

        Args:
            clause: What it is, for the status.
        """
        ...

    def wait(self, seconds: float | None = None) -> bool:
        """Until all that was asked for is compiled; False if that takes longer."""
        ...

    def release(self) -> None:
        """Give the model back as it was."""
        ...


class Backend(Protocol):
    """A way to run models faster."""

    @property
    def name(self) -> str:
        """As in `CompileStatus.backend`."""
        ...

    def prepare(self, model: nn.Module) -> Handle:
        """Begin; the model computes eagerly until its blocks are compiled.

        Raises:
            CompileError: If that can not be on this computer or with this model; nothing was changed.
        """
        ...
