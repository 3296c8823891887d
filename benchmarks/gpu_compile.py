"""A compiled UNet on a GPU: steps of one picture, of two, with a ControlNet, and switches of LoRAs under it.

Each part is written down when it is done, so that a run that is cut short leaves what it has measured. Blocks are
compiled in the first minutes; SD1.5 and SDXL are two commands (``--model``).
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ControlNetModel

from benchmarks import compile as on_any_device
from benchmarks import synthetic
from benchmarks.common import Claim, Report, Table, busy_label, lora_folder, parse_options, seconds
from benchmarks.gpu_machine import file_name, is_missing, on_cuda, versions
from benchmarks.timing import Case, Stopwatch, ratio, take_turns
from lib_lora.compile.inductor import Inductor

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.compile import Bench

ROUNDS = 30
TIMES_FASTER = {"sd15": 1.8, "sdxl": 1.5}
TIMES_FASTER_CONTROLLED = 1.7
PIXELS = 8
"""For each number of a latent."""


def main(argv: list[str] | None = None) -> int:
    options = parse_options("gpu_compile", __doc__.splitlines()[0], on_cuda(argv), ("fp16",))
    if is_missing(options.device):
        return 2
    for dtype in options.dtypes:
        report = Report(
            "gpu_compile", options, dtype, file=file_name("gpu-compile", options.device, options.model, dtype)
        )
        with lora_folder() as folder, torch.no_grad():
            bench = on_any_device.prepare(options, dtype, folder)
            for part in (on_any_device.measure_switches, on_any_device.measure_times, measure_two, measure_controlled):
                part(bench, report)
                report.save()
            bench.handle.release()
    return 0


def measure_two(bench: Bench, report: Report) -> None:
    """Two pictures, or one with guidance."""
    inputs = _inputs(bench, 2)
    steps = [partial(_predict, unet, inputs) for unet in (bench.plain, bench.compiled)]
    on_any_device.warm_up(steps[1], bench.handle)
    _compare(bench, report, "two pictures at a time", steps, TIMES_FASTER.get(bench.options.model, 1.0))


def measure_controlled(bench: Bench, report: Report) -> None:
    """One picture with a ControlNet, which is compiled too."""
    nets = [_controlnet(bench.plain) for _ in range(2)]
    inputs = _inputs(bench, 1)
    edge = PIXELS * inputs["sample"].shape[-1]
    picture = inputs["sample"].new_zeros((1, 3, edge, edge))
    steps = [
        partial(_predict_controlled, unet, net, inputs, picture)
        for unet, net in zip((bench.plain, bench.compiled), nets, strict=True)
    ]
    handle = Inductor(cuda_graphs=False).prepare(nets[1])
    for waited in (handle, bench.handle, handle):  # the UNet's blocks see other numbers of inputs now
        on_any_device.warm_up(steps[1], waited)
    _compare(bench, report, "one picture with a ControlNet", steps, TIMES_FASTER_CONTROLLED)
    handle.release()


def _compare(
    bench: Bench, report: Report, what: str, steps: list[Callable[[], torch.Tensor]], times_faster: float
) -> None:
    """Eager and compiled steps in turns, after their predictions were compared."""
    eager, compiled = (step() for step in steps)
    off = ((compiled - eager).abs().max() / eager.abs().max()).item()
    cases = [Case(name, step) for name, step in zip(("eager", "compiled"), steps, strict=True)]
    take_turns(cases, bench.options.rounds(ROUNDS), Stopwatch(bench.options.device))
    faster = ratio(*cases)
    rows = [(case.name, seconds(case.wall), seconds(case.busy)) for case in cases]
    claims = [
        Claim(f"{what}: times faster than eager", faster.median, times_faster, at_most=False, detail=faster.range),
        Claim(f"{what}: difference to eager", off, on_any_device.LARGEST_DIFFERENCE[bench.dtype]),
    ]
    notes = (f"{bench.handle.status.recompiles} recompiles so far", versions())
    report.add(Table(f"Steps: {what}", ("step", "wall", busy_label(bench.options)), rows, notes), claims)


def _controlnet(unet: Any) -> Any:
    net = ControlNetModel.from_unet(unet).eval().requires_grad_(False)
    return torch.nn.Module.to(net, unet.device, unet.dtype)  # diffusers' own `to` warns


def _inputs(bench: Bench, batch: int) -> dict[str, Any]:
    """Arguments of one step of `batch` pictures."""
    latents = on_any_device.GPU_LATENT if bench.options.device.type == "cuda" else on_any_device.LATENT
    inputs = synthetic.step_inputs(bench.plain, latents[bench.options.model])
    return {name: _repeated(value, batch) for name, value in inputs.items()}


def _repeated(value: Any, batch: int) -> Any:
    if isinstance(value, dict):
        return {name: _repeated(inner, batch) for name, inner in value.items()}
    return value if value.ndim == 0 else torch.cat([value] * batch)


def _predict(unet: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return unet(**inputs, return_dict=False)[0]


def _predict_controlled(unet: Any, net: Any, inputs: dict[str, Any], picture: torch.Tensor) -> torch.Tensor:
    down, mid = net(**inputs, controlnet_cond=picture, return_dict=False)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return unet(**inputs, **added, return_dict=False)[0]


if __name__ == "__main__":
    sys.exit(main())
