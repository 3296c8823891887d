"""From the name of a backend to a model that runs with it, or eagerly with a sentence why."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lib_lora.compile.eager import EagerHandle
from lib_lora.compile.inductor import Inductor
from lib_lora.compile.tensorrt import TensorRT
from lib_lora.errors import CompileError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from lib_lora.compile.protocol import Backend, Handle

OFF = "off"
BACKENDS = (Inductor.name, TensorRT.name)

logger = logging.getLogger(__name__)


def prepare(model: nn.Module, backend: Backend) -> Handle:
    """Begin to compile a model; if that can not be, it stays eager and its status says why."""
    try:
        return backend.prepare(model)
    except CompileError as error:
        logger.warning("%s", error)
        return EagerHandle(str(error))


def prepare_by_name(model: nn.Module, name: str, cache: Path | None = None) -> Handle:
    """The same by the name of the backend.

    Args:
        model: A UNet.
        name: One of `BACKENDS`, or ``off``.
        cache: Folder for compiled code; each backend has one of its own in it.
    """
    if name == OFF:
        return EagerHandle()
    kind = TensorRT if name == TensorRT.name else Inductor
    return prepare(model, kind(cache / name if cache else None))
