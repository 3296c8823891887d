"""torch_tensorrt: imported when it is asked for, for it raises anything where there is no GPU or no TensorRT."""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lib_lora.compile.attempt import Failure, attempt
from lib_lora.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor

NAME = "torch_tensorrt"
INSTALL = (
    "pip install torch_tensorrt of the same version as torch (2.13.0 for torch 2.13), "
    "with the libraries of TensorRT from NVIDIA's own package index"
)
_recording = threading.Lock()


class Package(NamedTuple):
    """What is used of torch_tensorrt and tensorrt.

    Attributes:
        trt: The module ``tensorrt``.
        compile: ``torch_tensorrt.dynamo.compile``.
        refit: ``torch_tensorrt.dynamo.refit_module_weights``.
        cache: ``torch_tensorrt.dynamo._engine_cache.BaseEngineCache``.
        context: ``torch_tensorrt.dynamo.conversion._ConversionContext.ConversionContext``, which is told every weight
            that goes into an engine.
        versions: Of both.
    """

    trt: Any
    compile: Callable[..., Any]
    refit: Callable[..., Any]
    cache: Any
    context: Any
    versions: tuple[str, str]


def load_package() -> Package:
    """Import it.

    Raises:
        CompileError: If it can not be used here: why, and what to do.
    """
    if not torch.cuda.is_available():
        raise CompileError(f"{NAME} needs an NVIDIA GPU that this torch can use, and there is none.")
    package = attempt(_import)
    if isinstance(package, Failure):
        missing = not installed_version()
        why = "is not installed" if missing else f"can not be imported: {package.reason}"
        raise CompileError(f"{NAME} {why}; {INSTALL}.")
    return package


def why_unusable() -> str:
    """Why it can not be used here: a sentence, or ``""``."""
    try:
        load_package()
    except CompileError as error:
        return str(error)
    return ""


def installed_version() -> str:
    """Of the installed package, which is not imported; ``""`` if there is none."""
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _import() -> Package:
    dynamo: Any = importlib.import_module(f"{NAME}.dynamo")
    trt: Any = importlib.import_module("tensorrt")
    return Package(
        trt,
        dynamo.compile,
        dynamo.refit_module_weights,
        importlib.import_module(f"{NAME}.dynamo._engine_cache").BaseEngineCache,
        importlib.import_module(f"{NAME}.dynamo.conversion._ConversionContext").ConversionContext,
        (importlib.import_module(NAME).__version__, trt.__version__),
    )


@contextmanager
def recorded_weights(package: Package) -> Generator[dict[str, Tensor]]:
    """Name in an engine → numbers, of all weights that go into engines inside the block.

    A name that stands for different numbers in two engines is left out.
    """
    weights: dict[str, Tensor] = {}
    unclear = set[str]()
    record = package.context.record_weight

    def listen(self: Any, name: str, weight: Tensor) -> None:
        record(self, name, weight)
        if name in weights and not torch.equal(weights[name], weight):
            unclear.add(name)
        weights[name] = weight

    with _recording:
        package.context.record_weight = listen
        try:
            yield weights
        finally:
            package.context.record_weight = record
            for name in unclear:
                del weights[name]
