"""Time of one denoising step against the number of LoRAs: prefused, hooked, and PEFT's dynamic adapters.

Batch 1, 32 x 32 latents, an SD1.5-shaped UNet. Prefused steps are compared with steps without LoRAs on the same weights
in the same memory; hook mode and PEFT are compared with a UNet that shares theirs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

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
from benchmarks.timing import Case, Stopwatch, extra, ratio, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from benchmarks.synthetic import LoraSet

    Way = tuple[Callable[[], Tensor], Callable[[int], object]]

LATENT = {"sd15": 32, "sdxl": 64, "small": 8}
RANKS = (32, 16, 64, 8, 32, 16, 64)
COUNTS = {"LierLa": (0, 1, 2, 4, 7), "C3Lier": (0, 7)}
PREFUSED_ROUNDS = {"LierLa": 9, "C3Lier": 6}
DYNAMIC_ROUNDS = {"LierLa": 8, "C3Lier": 5}
FEW_ROUNDS = 3
WARM_STEPS = 3
HOOK_TARGET = {"fp32": 1.0, "bf16": 0.6, "fp16": 0.6}
LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.05}
"""Largest difference of the outputs of two methods, in units of the largest output; more means other work was done."""


@dataclass(frozen=True)
class Bench:
    """One model, seven LoRA files, and one step."""

    options: Options
    dtype: str
    kind: str
    folder: Path
    unet: UNet2DConditionModel
    loras: LoraSet

    def step(self, unet: UNet2DConditionModel) -> Callable[[], Tensor]:
        """One denoising step of a UNet: () → its prediction, (1, 4, latent, latent)."""
        inputs = synthetic.step_inputs(unet, LATENT[self.options.model])
        return torch.no_grad()(lambda: unet(**inputs).sample)

    def run(self, cases: Sequence[Case], rounds: int) -> None:
        """Time the cases in turns."""
        take_turns(cases, self.options.rounds(rounds), Stopwatch(self.options.device))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("steps", __doc__.splitlines()[0], argv, ("fp32", "bf16"))
    for dtype in options.dtypes:
        report = Report("steps", options, dtype)
        unet = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
        for kind in options.kinds:
            with lora_folder() as folder:
                bench = Bench(options, dtype, kind, folder, unet, synthetic.write_loras(folder, unet, kind, RANKS))
                prefused_output = measure_prefused(bench, report)
                measure_dynamic(bench, report, prefused_output)
        report.save()
    return 0


def measure_prefused(bench: Bench, report: Report) -> Tensor:
    """Step time with the first N LoRAs fused, N in turns; returns the prediction with all of them."""
    ours = Ours(bench.unet, bench.folder)
    step = bench.step(bench.unet)
    cases = [_warm_case(str(count), step, partial(ours.switch, bench.loras[:count])) for count in COUNTS[bench.kind]]
    bench.run(cases, PREFUSED_ROUNDS[bench.kind])
    ours.switch(bench.loras)
    output = step()
    ours.unload()
    rows = [(case.name, seconds(case.wall), seconds(case.busy), str(ratio(case, cases[0]))) for case in cases]
    columns = ("LoRAs", "step, wall", busy_label(bench.options), "times the step without (quartiles)")
    notes = (
        f"ranks {RANKS}; {len(cases[0].samples)} rounds, every N in each; after a set {WARM_STEPS} steps are not timed",
    )
    last = ratio(cases[-1], cases[0])
    claim = Claim(f"{bench.kind}: prefused step, 7 LoRAs / 0 LoRAs", last.median, 1.01, detail=last.range)
    report.add(Table(f"{bench.kind}, prefused", columns, rows, notes), [claim])
    return output


def measure_dynamic(bench: Bench, report: Report, prefused_output: Tensor) -> None:
    """Step time in hook mode and with PEFT's adapters, in turns with a UNet without LoRAs that shares the weights."""
    ways = {"hook mode": _hooked(bench), "PEFT dynamic": _peft(bench)}
    rows: list[tuple[str, ...]] = []
    few = [count for count in COUNTS[bench.kind] if 0 < count < len(RANKS)]
    for counts, rounds in ((few, FEW_ROUNDS), ([len(RANKS)], DYNAMIC_ROUNDS[bench.kind])):
        plain = _warm_case("no LoRA", bench.step(bench.unet), lambda: None)
        cases = [
            _warm_case(f"{name}, {count} LoRAs", step, partial(use, count))
            for count in counts
            for name, (step, use) in ways.items()
        ]
        bench.run([plain, *cases] if cases else [], rounds)
        rows += [_dynamic_row(case, plain) for case in cases]
    hook, peft = (extra(case, plain) for case in cases)
    text = f"{bench.kind}: what 7 LoRAs add to a step, hook mode / PEFT dynamic"
    target = HOOK_TARGET["bf16" if bench.options.device.type == "cuda" else bench.dtype]
    claim = Claim(text, hook / peft, target, detail=f"({seconds(hook)} / {seconds(peft)})")
    notes = tuple(_agreement(bench, name, step, use, prefused_output) for name, (step, use) in ways.items())
    columns = ("way", "step, wall", busy_label(bench.options), "times the step without (quartiles)", "added")
    report.add(Table(f"{bench.kind}, not fused", columns, rows, notes), [claim])


def _warm_case(name: str, step: Callable[[], Tensor], use: Callable[[], object]) -> Case:
    """A step among others: the set and the steps right after it are not timed.

    After seconds of GEMMs this machine is slower for a step or two, whatever they computed: products that nobody used
    did the same to a UNet without LoRAs.
    """

    def warm() -> None:
        use()
        for _ in range(WARM_STEPS):
            step()

    return Case(name, step, warm)


def _dynamic_row(case: Case, plain: Case) -> tuple[str, ...]:
    added = seconds(extra(case, plain))
    return case.name, seconds(case.wall), seconds(case.busy), str(ratio(case, plain)), added


def _hooked(bench: Bench) -> Way:
    """A UNet in hook mode: its step, and what makes the first N LoRAs active."""
    unet = synthetic.sibling(bench.unet)
    ours = Ours(unet, bench.folder, mode="hook")
    return bench.step(unet), lambda count: ours.switch(bench.loras[:count])


def _peft(bench: Bench) -> Way:
    """The same for a UNet with PEFT's adapters, loaded by diffusers."""
    unet = synthetic.sibling(bench.unet)
    layers = list(synthetic.target_layers(unet, bench.kind))
    read = partial(synthetic.read_factors, layers=layers, dtype=DTYPES[bench.dtype], device=bench.options.device)
    load_adapters(unet, {name: read(bench.folder / f"{name}.safetensors") for name, _ in bench.loras})

    def use(count: int) -> None:
        names, strengths = zip(*bench.loras[:count], strict=True)
        unet.set_adapters(list(names), list(strengths))

    return bench.step(unet), use


def _agreement(bench: Bench, name: str, step: Callable[[], Tensor], use: Callable[[int], object], fused: Tensor) -> str:
    """How far a way's prediction with all LoRAs is from the prefused one."""
    use(len(RANKS))
    difference = ((step() - fused).abs().max() / fused.abs().max()).item()
    if not difference < LARGEST_DIFFERENCE[bench.dtype]:
        raise RuntimeError(f"{name} predicts something else: {difference:.1e} off")
    return f"{name}: prediction within {difference:.1e} of the prefused one, in units of the largest number"


if __name__ == "__main__":
    sys.exit(main())
