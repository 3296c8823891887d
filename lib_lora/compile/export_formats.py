"""Three files that hold a UNet for other programs: how each is written, and opened again."""

from __future__ import annotations

import importlib
import logging
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from lib_lora.compile.onnx_files import load_onnx, save_onnx
from lib_lora.core.replacing import making_file, making_folder
from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor, nn

    from lib_lora.compile.unet_inputs import Tensors, UNetInputs, UNetSize

    Run = Callable[[Mapping[str, Tensors]], Tensor]

_JIT: Any = torch.jit
_ONNX: Any = torch.onnx
OLDEST_TORCH = (2, 6)
"""From this version on torch.export takes all of a UNet, sizes that differ too."""


class Plan(NamedTuple):
    """What is exported.

    Attributes:
        model: With named inputs, in eval mode.
        inputs: Of the model.
        size: Of the call that is recorded.
        dynamic: Whether other sizes will be asked for.
        swappable: Whether weights stay apart, under their names.
    """

    model: nn.Module
    inputs: UNetInputs
    size: UNetSize
    dynamic: bool
    swappable: bool


class Format(Protocol):
    """A kind of file."""

    def check(self, out: Path) -> None:
        """Whether it can be made here: to be called before a model is loaded.

        Raises:
            JobError: If a package is missing or too old.
        """
        ...

    def record(self, plan: Plan) -> Any:
        """The graph; takes a minute for a large model."""
        ...

    def making(self, out: Path, size: int, *, overwrite: bool) -> AbstractContextManager[Path]:
        """A path to write to, which becomes `out` if the block ends well."""
        ...

    def write(self, graph: Any, path: Path) -> None:
        """Write what `record` gave."""
        ...

    def open(self, path: Path) -> Run:
        """Read the file, and give what runs it.

        Raises:
            CannotRunError: If the file is well formed and nothing here can run it.
        """
        ...


class TorchScript:
    """``torch.jit``: one file, from torch 2.1.2 on."""

    def check(self, out: Path) -> None:
        """Every torch can."""

    def record(self, plan: Plan) -> Any:
        """Traced; constants of the graph where weights are not to be replaced."""
        example = plan.inputs.random(plan.size, seed=0)
        with _quiet():
            traced = _JIT.trace(plan.model, example_kwarg_inputs=example, check_trace=False)
            return traced if plan.swappable else _JIT.freeze(traced)

    def making(self, out: Path, size: int, *, overwrite: bool) -> AbstractContextManager[Path]:
        """One file."""
        return making_file(out, size, overwrite)

    def write(self, graph: Any, path: Path) -> None:
        """Write it."""
        with _quiet():
            _JIT.save(graph, str(path))

    def open(self, path: Path) -> Run:
        """Read it."""
        with _quiet():
            module = _JIT.load(str(path))
        return lambda inputs: module(**inputs)


class ExportedProgramFile:
    """``torch.export``: one file, whose weights are parameters in any case."""

    def check(self, out: Path) -> None:
        """Torch must be new enough."""
        _check_torch("exported-program")

    def record(self, plan: Plan) -> Any:
        """Exported."""
        return export_program(plan)

    def making(self, out: Path, size: int, *, overwrite: bool) -> AbstractContextManager[Path]:
        """One file."""
        return making_file(out, size, overwrite)

    def write(self, graph: Any, path: Path) -> None:
        """Write it."""
        with _quiet():
            torch.export.save(graph, str(path))

    def open(self, path: Path) -> Run:
        """Read it."""
        with _quiet():
            module = torch.export.load(str(path)).module()
        return lambda inputs: module(**inputs)


class Onnx:
    """ONNX: one file of at most 2 GB, or a folder with a graph and a .safetensors file of weights."""

    def check(self, out: Path) -> None:
        """The packages must be there, and torch new enough."""
        _check_torch("onnx")
        missing = [name for name in ("onnx", "onnxscript") if not _is_there(name)]
        if missing:
            raise JobError(
                f"To write ONNX the packages {' and '.join(missing)} are needed: pip install onnx onnxscript"
            )

    def record(self, plan: Plan) -> Any:
        """Exported, then translated; a graph whose weights are to be replaced is not simplified."""
        with _quiet():
            return _ONNX.export(
                export_program(plan),
                dynamo=True,
                optimize=not plan.swappable,
                output_names=["prediction"],
                verbose=False,
            )

    def making(self, out: Path, size: int, *, overwrite: bool) -> AbstractContextManager[Path]:
        """A file if the name says so, a folder else."""
        return making_file(out, size, overwrite) if out.suffix else making_folder(out)

    def write(self, graph: Any, path: Path) -> None:
        """Write it."""
        save_onnx(graph, path)

    def open(self, path: Path) -> Run:
        """Read it."""
        return load_onnx(path)


FORMATS: dict[str, Format] = {
    "torchscript": TorchScript(),
    "exported-program": ExportedProgramFile(),
    "onnx": Onnx(),
}


def export_program(plan: Plan) -> Any:
    """The graph of torch.export."""
    dims = plan.inputs.dynamic() if plan.dynamic else None
    size = replace(plan.size, batch=max(2, plan.size.batch)) if plan.dynamic else plan.size
    with _quiet():
        example = plan.inputs.random(size, seed=0)
        return torch.export.export(plan.model, (), example, dynamic_shapes=dims, strict=False)


def _check_torch(name: str) -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise JobError(f"The format {name} needs torch 2.6 or newer, this is {torch.__version__}; take torchscript.")


def _is_there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


@contextmanager
def _quiet() -> Generator[None]:
    """What tracers say about code of diffusers, and about themselves, is not for users; results are compared."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
