"""A UNet as a file that other programs run; it is written once it has computed what the model does."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.compile.export_formats import FORMATS, Plan
from lib_lora.compile.judge import LARGEST_DIFFERENCE
from lib_lora.compile.onnx_files import CannotRunError
from lib_lora.compile.unet_inputs import ExportedUNet, UNetInputs, described
from lib_lora.core.memory import OUT_OF_MEMORY
from lib_lora.core.saving import check_output, no_progress
from lib_lora.errors import JobError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from lib_lora.compile.export_formats import Format, Run
    from lib_lora.compile.unet_inputs import UNetSize
    from lib_lora.core.saving import Progress

STAGES = 3
"""Recorded, written, compared."""


@dataclass(frozen=True)
class ExportReport:
    """A file that was written, and compared with the model.

    Attributes:
        path: File or folder.
        format: A key of `FORMATS`.
        bytes: On the disk.
        inputs: Name → shape of the recorded call, for people.
        dtype: Of the weights, and of all inputs but the timestep (float32).
        dynamic: Whether it takes other sizes.
        swappable: Whether weights stay apart, under their names.
        difference: RMS of the largest difference to the model, in units of the RMS of what it predicts; None if
            nothing here can run the file.
        allowed: Largest difference with which a file is written.
        notes: What else there is to say.
        seconds: That it took.
    """

    path: Path
    format: str
    bytes: int
    inputs: dict[str, str]
    dtype: str
    dynamic: bool
    swappable: bool
    difference: float | None
    allowed: float
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """For people."""
        lines = [f"  {name:12} {shape}" for name, shape in self.inputs.items()]
        kind = "weights under their names" if self.swappable else "weights fixed"
        sizes = "any sizes" if self.dynamic else "these sizes only"
        proof = (
            "not run" if self.difference is None else f"{self.difference:.1e} from the model ({self.allowed:g} allowed)"
        )
        size = f"{self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"
        notes = [f"! {note}" for note in self.notes]
        return "\n".join(
            [f"{self.format}, {self.dtype}, {kind}, {sizes}:", *lines, *notes, f"{self.path}: {size}, {proof}"]
        )


def check_export(kind: str, out: Path, *, overwrite: bool) -> None:
    """Whether an export can be made: to be called before a model is loaded.

    Raises:
        JobError: If a package is missing or too old.
        OutputError: If `out` can not be written.
    """
    FORMATS[kind].check(out)
    check_output(out, overwrite=overwrite)


def export_unet(
    unet: nn.Module,
    kind: str,
    out: Path,
    size: UNetSize,
    *,
    controlnet: bool = False,
    dynamic: bool = False,
    swappable: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ExportReport:
    """Write a UNet with the weights that it has now.

    Args:
        unet: A diffusers UNet.
        kind: A key of `FORMATS`.
        out: File to be; for ONNX a folder to be, if it has no suffix.
        size: Of the call that is recorded.
        controlnet: Whether it takes a ControlNet's residuals.
        dynamic: Whether it takes other sizes than `size`.
        swappable: Whether each weight stays apart, under its name.
        overwrite: Whether an older file is replaced.
        progress: Told the stages; what it raises ends the export, and nothing is written.

    Raises:
        JobError: If that size can not be exported, a package is missing, or the tracer can not follow the model.
        OutputError: If the file can not be written, or computes something else; nothing is written then.
    """
    start = time.perf_counter()
    kept = FORMATS[kind]
    inputs = UNetInputs(unet, controlnet=controlnet)
    inputs.check(size, dynamic=dynamic)
    check_export(kind, out, overwrite=overwrite)
    model = ExportedUNet(unet)
    model.eval()
    plan = Plan(model, inputs, size, dynamic, swappable)
    weights = sum(weight.nbytes for weight in unet.parameters())
    with torch.no_grad():
        graph = _attempt(f"the UNet can not be recorded as {kind}", partial(kept.record, plan))
        progress(1, STAGES)
        with kept.making(out, weights, overwrite=overwrite) as path:
            _attempt(f"{out.name} was not saved", partial(kept.write, graph, path))
            progress(2, STAGES)
            del graph  # as large as the model
            difference, notes = _compare(kept, path, plan)
    progress(STAGES, STAGES)
    return ExportReport(
        path=out,
        format=kind,
        bytes=sum(file.stat().st_size for file in [out, *out.glob("*")] if file.is_file()),
        inputs=described(inputs.shapes(size)),
        dtype=str(next(unet.parameters()).dtype).removeprefix("torch."),
        dynamic=dynamic,
        swappable=swappable,
        difference=difference,
        allowed=_allowed(unet),
        notes=notes,
        seconds=time.perf_counter() - start,
    )


def _attempt(what: str, action: Any) -> Any:
    """Do what raises RuntimeErrors of all kinds: tracers and their writers."""
    try:
        return action()
    except OUT_OF_MEMORY as error:
        raise JobError(f"{what}: memory ran out; try a smaller size, or --device cpu.") from error
    except RuntimeError as error:
        raise JobError(f"{what}: {str(error).strip().splitlines()[0]}") from error


def _compare(kept: Format, path: Path, plan: Plan) -> tuple[float | None, tuple[str, ...]]:
    """(largest difference of the file to the model, notes).

    Raises:
        OutputError: If it is larger than allowed.
    """
    try:
        run = _attempt("what was written can not be read", partial(kept.open, path))
    except CannotRunError as error:
        return None, (f"its form was checked, its numbers were not: {error}",)
    allowed = _allowed(plan.model)
    largest = 0.0
    for size, difference in _differences(run, plan):
        if not difference <= allowed:  # NaN too
            raise OutputError(
                f"{path.name} was not saved: with {size} it is {difference:.1e} from the model, {allowed:g} is allowed."
            )
        largest = max(largest, difference)
    return largest, ()


def _differences(run: Run, plan: Plan) -> Iterator[tuple[UNetSize, float]]:
    """Of calls with other numbers than the recorded one, and with other sizes if it has to take them."""
    sizes = [plan.size, *([plan.size.other(plan.inputs.coarse)] if plan.dynamic else [])]
    for seed, size in enumerate(sizes, start=1):
        inputs = plan.inputs.random(size, seed)
        expected: Tensor = plan.model(**inputs).float().cpu()
        got = _attempt(f"what was written can not be run with {size}", partial(run, inputs)).float().cpu()
        yield size, float(((got - expected).square().sum() / expected.square().sum()).sqrt())


def _allowed(model: nn.Module) -> float:
    return LARGEST_DIFFERENCE[next(model.parameters()).dtype]
