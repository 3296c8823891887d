"""LoRA switches on a compiled UNet: recompiles, the time of a switch, steps with LoRAs; PEFT's adapters beside.

On a CPU one UNet is compiled and one that shares no weights with it is not; the times of compiled steps there are for
information. What is promised of a GPU is measured with ``--device cuda`` only.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch._dynamo import config as dynamo_config

from benchmarks import synthetic
from benchmarks.common import (
    DTYPES,
    Claim,
    Options,
    Ours,
    Report,
    Table,
    busy_label,
    lora_folder,
    parse_options,
    seconds,
)
from benchmarks.peers import load_adapters
from benchmarks.timing import Case, Stopwatch, ratio, take_turns
from lib_lora.compile.inductor import Inductor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from benchmarks.synthetic import LoraSet
    from lib_lora.compile.protocol import Handle

LATENT = {"sd15": 16, "sdxl": 32, "small": 8}
GPU_LATENT = {"sd15": 64, "sdxl": 128, "small": 8}
SWITCHES = 100
SET_SIZE = 5
MOST = 7
RANKS = (32, 16, 64, 8, 32, 16, 64)
ROUNDS = 8
WARM_SECONDS = 3600.0
LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}
"""Compiled and eager prediction, in units of the largest number, after each switch."""
TIMES_FASTER = {"sd15": 1.8, "sdxl": 1.5}


@dataclass(frozen=True)
class Bench:
    """Two UNets with the same weights, one of them compiled, and the LoRA files of two sets."""

    options: Options
    dtype: str
    folder: Path
    sets: tuple[LoraSet, LoraSet]
    plain: UNet2DConditionModel
    compiled: UNet2DConditionModel
    handle: Handle
    warm_seconds: float

    def step(self, unet: UNet2DConditionModel) -> Callable[[], Tensor]:
        """One denoising step: () → (1, 4, latent, latent)."""
        return make_step(self.options, unet)

    def ours(self, unet: UNet2DConditionModel) -> Ours:
        """Our switches of a UNet."""
        changed = self.handle.weights_changed if unet is self.compiled else None
        return Ours(unet, self.folder, on_weights_changed=changed)

    def run(self, cases: Sequence[Case]) -> None:
        """Time the cases in turns."""
        take_turns(cases, self.options.rounds(ROUNDS), Stopwatch(self.options.device))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("compile", __doc__.splitlines()[0], argv, ("fp32",))
    for dtype in options.dtypes:
        report = Report("compile", options, dtype)
        with lora_folder() as folder:
            bench = prepare(options, dtype, folder)
            measure_switches(bench, report)
            measure_times(bench, report)
            bench.handle.release()
            if not options.alone:
                measure_peft(bench, report)
        report.save()
    return 0


def make_step(options: Options, unet: UNet2DConditionModel) -> Callable[[], Tensor]:
    """One denoising step of a UNet."""
    latents = GPU_LATENT if options.device.type == "cuda" else LATENT
    inputs = synthetic.step_inputs(unet, latents[options.model])
    return torch.no_grad()(lambda: unet(**inputs).sample)


def prepare(options: Options, dtype: str, folder: Path) -> Bench:
    """Compile, and wait until every block answers compiled."""
    kind = options.kinds[-1]
    plain = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
    sets = tuple(synthetic.write_loras(folder, plain, kind, RANKS, prefix) for prefix in "ab")
    compiled = synthetic.sibling(plain, synthetic.target_weights(plain, kind))
    start = time.perf_counter()
    handle = Inductor(cuda_graphs=False).prepare(compiled)
    warm_up(make_step(options, compiled), handle)
    if len(handle.status.compiled) < handle.status.blocks:
        raise RuntimeError(f"not compiled: {handle.status}")
    return Bench(options, dtype, folder, sets, plain, compiled, handle, time.perf_counter() - start)


def warm_up(step: Callable[[], object], handle: Handle) -> None:
    """Until a step asks for nothing new: a compiled block may hand on another layout than an eager one."""
    asked = -1
    while handle.status.asked > asked:
        asked = handle.status.asked
        step()
        if not handle.wait(WARM_SECONDS):
            raise RuntimeError(f"not compiled in {WARM_SECONDS:.0f} s: {handle.status}")
        step()
    if handle.status.reason:
        raise RuntimeError(f"not compiled: {handle.status}")


def requests(bench: Bench) -> Iterator[LoraSet]:
    """No LoRA, one, five, five others, other strengths, seven, none again."""
    first, second = bench.sets
    sets = ((), first[:1], first[:SET_SIZE], second[:SET_SIZE], first, second[:2])
    for number, loras in zip(range(SWITCHES), itertools.cycle(sets)):
        yield tuple((name, strength + number / 1000) for name, strength in loras)


def measure_switches(bench: Bench, report: Report) -> None:
    """Switch a hundred times under ``error_on_recompile``; each prediction is compared with the eager one."""
    compiled, plain = (bench.ours(unet) for unet in (bench.compiled, bench.plain))
    steps = [bench.step(unet) for unet in (bench.compiled, bench.plain)]
    before, dynamo_config.error_on_recompile = dynamo_config.error_on_recompile, True
    worst = 0.0
    try:
        for loras in requests(bench):
            compiled.switch(loras)
            plain.switch(loras)
            got, expected = (step() for step in steps)
            worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
    finally:
        dynamo_config.error_on_recompile = before
        compiled.unload()
        plain.unload()
    status = bench.handle.status
    if len(status.compiled) < status.blocks:
        raise RuntimeError(f"blocks were given up: {status}")
    table = Table(
        f"{SWITCHES} switches between no LoRA and {MOST}",
        ("blocks compiled", "until they were", "switches", "recompiles", "largest difference to eager"),
        [(str(status.blocks), seconds(bench.warm_seconds), str(SWITCHES), str(status.recompiles), f"{worst:.1e}")],
    )
    claims = [
        Claim(f"recompiles over {SWITCHES} switches", status.recompiles, 0),
        Claim("compiled / eager prediction after each switch, difference", worst, LARGEST_DIFFERENCE[bench.dtype]),
    ]
    report.add(table, claims)


def measure_times(bench: Bench, report: Report) -> None:
    """Switches and steps of both UNets in turns."""
    compiled, plain = (bench.ours(unet) for unet in (bench.compiled, bench.plain))
    first, second = (loras[:SET_SIZE] for loras in bench.sets)
    steps = [bench.step(unet) for unet in (bench.compiled, bench.plain)]
    cases = {
        name: Case(f"switch {SET_SIZE} → {SET_SIZE}, {name}", partial(ours.switch, second), partial(ours.switch, first))
        for name, ours in (("compiled", compiled), ("eager", plain))
    }
    cases |= {
        "none": _warm_case("step compiled, no LoRA", steps[0], compiled.clear),
        "seven": _warm_case(f"step compiled, {MOST} LoRAs", steps[0], partial(compiled.switch, bench.sets[0])),
        "plain": _warm_case("step eager, no LoRA", steps[1], plain.clear),
    }
    bench.run(list(cases.values()))
    compiled.unload()
    plain.unload()
    rows = [(case.name, seconds(case.wall), seconds(case.busy)) for case in cases.values()]
    switch, loras = ratio(cases["compiled"], cases["eager"]), ratio(cases["seven"], cases["none"])
    faster = ratio(cases["plain"], cases["none"])
    claims = [
        Claim("switch under compilation / in eager", switch.median, 1.1, detail=switch.range),
        Claim(f"{MOST} LoRAs / 0 LoRAs, compiled step", loras.median, 1.01, detail=loras.range),
    ]
    notes = [f"a compiled step is {faster} times as fast as an eager one"]
    if bench.options.device.type == "cuda" and bench.options.model in TIMES_FASTER:
        target = TIMES_FASTER[bench.options.model]
        claims.append(Claim("times faster than eager", faster.median, target, at_most=False, detail=faster.range))
    else:
        notes.append("GPU rows (fp16 steps, with ControlNet, CUDA graphs): not run: no GPU")
    report.add(Table("Times", ("what", "wall", busy_label(bench.options)), rows, tuple(notes)), claims)


def _warm_case(name: str, step: Callable[[], Tensor], use: Callable[[], object]) -> Case:
    """A step among others: the switch and the step right after it are not timed."""

    def warm() -> None:
        use()
        step()

    return Case(name, step, warm)


def measure_peft(bench: Bench, report: Report) -> None:
    """What changes of PEFT's adapters cost a UNet whose blocks torch.compile compiled: tracing only, no code is made.

    Always on the small model: each change is minutes on a real one.
    """
    with lora_folder() as folder:
        unet = synthetic.make_unet("small", torch.float32, bench.options.device)
        layers = list(synthetic.target_layers(unet, "LierLa"))
        loras = synthetic.write_loras(folder, unet, "LierLa", RANKS[:2])
        read = partial(synthetic.read_factors, layers=layers, dtype=torch.float32, device=bench.options.device)
        load_adapters(unet, {name: read(folder / f"{name}.safetensors") for name, _ in loras})
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    inputs = synthetic.step_inputs(unet, LATENT["small"])
    compiled = torch.compile(unet, backend=count, dynamic=False)
    names = [name for name, _ in loras]
    rows: list[tuple[str, ...]] = []
    changes = {"the first": ([names[0]], [1.0]), "another": ([names[1]], [1.0]), "a strength": ([names[1]], [0.5])}
    for change, (active, strengths) in changes.items():
        unet.set_adapters(active, strengths)
        before, start = len(graphs), time.perf_counter()
        with torch.no_grad():
            compiled(**inputs)
        rows.append((change, str(len(graphs) - before), seconds(time.perf_counter() - start)))
    columns = ("set_adapters", "compilations", "step after it")
    report.add(Table("PEFT's adapters under torch.compile, small model, tracing alone", columns, rows))


if __name__ == "__main__":
    sys.exit(main())
