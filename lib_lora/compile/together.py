"""The models that draw one picture, such as a UNet and its ControlNets: one backend, one status."""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import TYPE_CHECKING

from lib_lora.compile.choose import OFF, prepare_by_name
from lib_lora.compile.protocol import CompileStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from lib_lora.compile.protocol import Handle
    from lib_lora.core.layers import LayerRef


class CompiledModels:
    """A handle of several models, whose backend can be changed while they live.

    Attributes:
        backend: What was asked for: one of `BACKENDS`, or ``off``.
    """

    def __init__(
        self, models: Mapping[str, nn.Module] = MappingProxyType({}), backend: str = OFF, cache: Path | None = None
    ) -> None:
        """Begin to compile.

        Args:
            models: Component → model, such as ``unet`` and ``controlnet``.
            backend: One of `BACKENDS`, or ``off``.
            cache: Folder for compiled code.
        """
        self.backend = OFF
        self._models, self._cache = dict(models), cache
        self._handles: dict[str, Handle] = {}
        self._switches, self._switch_ms = 0, 0.0
        self.use(backend)

    def use(self, backend: str) -> None:
        """Take another backend; models that can not be compiled with it run eagerly, and the status says why."""
        self.release()
        self.backend = backend
        self._handles = {name: prepare_by_name(model, backend, self._cache) for name, model in self._models.items()}

    @property
    def status(self) -> CompileStatus:
        """How far all of them are."""
        statuses = {name: handle.status for name, handle in self._handles.items()}
        parts = statuses.values()
        return CompileStatus(
            backend=next((part.backend for part in parts if part.blocks), CompileStatus.backend),
            blocks=sum(part.blocks for part in parts),
            compiled=tuple(f"{name}.{block}" for name, part in statuses.items() for block in part.compiled),
            asked=sum(part.asked for part in parts),
            done=sum(part.done for part in parts),
            recompiles=sum(part.recompiles for part in parts),
            switches=self._switches,
            switch_ms=self._switch_ms,
            reason=" ".join(_reasons(statuses)),
        )

    def weights_changed(self, layers: Sequence[LayerRef]) -> None:
        """Bring new weights to the models they are in."""
        start = time.perf_counter()
        for name, handle in self._handles.items():
            if own := [layer for layer in layers if layer.component == name]:
                handle.weights_changed(own)
        self._switches += 1
        self._switch_ms = (time.perf_counter() - start) * 1e3

    def pause(self, clause: str) -> None:
        """Compute eagerly as long as something changes what the models' parts do; ``""`` ends that."""
        for handle in self._handles.values():
            handle.pause(clause)

    def wait(self, seconds: float | None = None) -> bool:
        """Until all that was asked for is compiled; False if that takes longer."""
        end = None if seconds is None else time.monotonic() + seconds
        return all(
            handle.wait(None if end is None else max(0.0, end - time.monotonic())) for handle in self._handles.values()
        )

    def release(self) -> None:
        """Give the models back as they were."""
        for handle in self._handles.values():
            handle.release()
        self._handles = {}


def _reasons(statuses: Mapping[str, CompileStatus]) -> Iterator[str]:
    """Why parts run eagerly; a reason that all models have is told once."""
    reasons = {name: status.reason for name, status in statuses.items() if status.reason}
    if len(reasons) == len(statuses) and len(set(reasons.values())) == 1:
        yield next(iter(reasons.values()))
        return
    yield from (f"{name}: {reason}" for name, reason in reasons.items())
