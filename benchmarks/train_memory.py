"""Memory that a training takes on a GPU, counted on paper, and how far the count is from what is measured.

The count is that of `counted_step`. It is compared with real steps of SD1.5's shape: in float32 on the CPU the growth
of the process, on a GPU in the given type the growth of what its allocator gave.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import torch

from benchmarks.common import Claim, Options, Report, Table, parse_options
from benchmarks.counted_step import Job, Parts, count_encoding, count_step, make_inputs, products
from benchmarks.memory import peak_bytes
from lib_lora.core.memory import return_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.counted_step import Counted

SIDES = {"sd15": 512, "sdxl": 1024, "small": 64}
MODELS = ("sd15", "sdxl")
VARIANTS = (
    {"checkpointing": False},
    {},
    {"batch": 2, "checkpointing": False},
    {"batch": 2},
    {"rank": 32},
    {"rank": 128},
    {"rank": 32, "kind": "C3Lier"},
)
CARD, TAKEN = 8.0, 1.0
"""GiB of a card, and what CUDA, the libraries' scratch memory and a desktop take of it."""
MEASURED_SIDE = 256
CLOSE = 0.15
"""Part by which the count may be off."""
STEP = "--step"
"""Marks the process that measures a step: with or without checkpointing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and measure what can be measured here; 1 if a promise does not hold."""
    given = list(sys.argv[1:] if argv is None else argv)
    if STEP in given:
        return measure_step(given)
    options = parse_options("train_memory", __doc__.splitlines()[0], given, ("bf16",))
    models = ("small",) if options.model == "small" else MODELS
    misses = 0
    for dtype in options.dtypes:
        report = Report("train_memory", options, dtype)
        count_steps(models, dtype, report)
        if options.model != "small":
            count_encodings(report)
        compare(options, dtype, given, report)
        report.save()
        misses += sum(not claim.met for claim in report.claims)
    return min(1, misses)


def count_steps(models: Sequence[str], dtype: str, report: Report) -> None:
    """Every variant of each model."""
    jobs = [Job(model, SIDES[model], dtype=dtype, **variant) for model in models for variant in VARIANTS]
    counted = {job: count_step(job) for job in jobs}
    columns = ("model", "pixels", "network", "batch", "checkpointing")
    sizes = ("weights", "network, optimizer", "a step adds", "of that kept for the backward", "together")
    rows = [(*_names(job), *map(_gib, _sizes(found))) for job, found in counted.items()]
    notes = (
        "GiB on the GPU: frozen weights and products in the type above, the network and AdamW in float32; the UNet "
        "alone is trained, pictures and captions are encoded before",
        "not counted: CUDA itself, scratch memory of the libraries' kernels, fragmentation",
    )
    report.add(Table("A step, counted", (*columns, *sizes), rows, notes), _claims(models, dtype, counted))


def _names(job: Job) -> tuple[str, ...]:
    network = f"{job.kind}, rank {job.rank}"
    return job.model, f"{job.side} x {job.side}", network, str(job.batch), "yes" if job.checkpointing else "no"


def _sizes(found: Counted) -> tuple[int, ...]:
    return found.weights, found.trained, found.step, found.kept, found.peak


def _claims(models: Sequence[str], dtype: str, counted: dict[Job, Counted]) -> list[Claim]:
    claims: list[Claim] = []
    for model in models:
        plain, less, wide = (
            Job(model, SIDES[model], dtype=dtype, **variant) for variant in ({"checkpointing": False}, {}, {"rank": 32})
        )
        text = f"{model}: LierLa of rank 32 with checkpointing, GiB"
        detail = f"of {CARD:g}, of which {TAKEN:g} is left to CUDA and a desktop"
        claims += [
            Claim(text, counted[wide].peak / 2**30, CARD - TAKEN, detail=detail),
            Claim(f"{model}: a step with checkpointing, of one without", counted[less].step / counted[plain].step, 0.5),
        ]
    return claims if models == MODELS else []


def count_encodings(report: Report) -> None:
    """Before the first step, when the UNet is not there yet."""
    found = {side: count_encoding(side) for side in (512, 1024)}
    rows = [(f"{side} x {side}", *map(_gib, (one.weights, one.step, one.peak))) for side, one in found.items()]
    columns = ("pixels", "autoencoder", "a picture adds", "together")
    report.add(Table("Encoding pictures, one at a time, in float32", columns, rows, ("GiB, counted",)))


def compare(options: Options, dtype: str, given: Sequence[str], report: Report) -> None:
    """What a step adds, counted and measured in a process of its own."""
    job = _measured_job(options, dtype)
    kinds = {"no": False, "yes": True}
    counted = [count_step(replace(job, checkpointing=on)).step for on in kinds.values()]
    measured = [_measured(given, checkpointing=on) for on in kinds.values()]
    saved = (counted[0] - counted[1]) / (measured[0] - measured[1])
    rows = [
        (kind, *map(_gib, (one, other, other - one))) for kind, one, other in zip(kinds, counted, measured, strict=True)
    ]
    columns = ("checkpointing", "counted", "measured", "scratch memory of kernels: not counted")
    notes = (
        f"GiB that a step adds: {job.model}, {job.side} x {job.side} pixels, batch {job.batch}, {job.dtype}",
        f"what checkpointing saves, counted / measured: {saved:.2f}",
    )
    claims = [Claim("the count of what checkpointing saves is off by", abs(saved - 1), CLOSE)]
    report.add(Table("Counted and measured", columns, rows, notes), claims if job.model != "small" else [])


def _measured_job(options: Options, dtype: str) -> Job:
    small = options.model == "small"
    cuda = options.device.type == "cuda"
    side = SIDES[options.model] if small or cuda else MEASURED_SIDE
    return Job("small" if small else "sd15", side, dtype=dtype if cuda else "fp32")


def _measured(given: Sequence[str], checkpointing: bool) -> int:
    words = [STEP, "on" if checkpointing else "off", *given]
    command = [sys.executable, "-m", "benchmarks.train_memory", *words]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])  # noqa: S603


def measure_step(given: list[str]) -> int:
    """Do a step, for what libraries keep from then on, and print the bytes that a second one adds, at most."""
    place = given.index(STEP)
    options = parse_options("train_memory", "", given[:place] + given[place + 2 :], ("bf16",))
    job = replace(_measured_job(options, options.dtypes[0]), checkpointing=given[place + 1] == "on")
    with options.device:
        parts, inputs = Parts.of(job), make_inputs(job)
    for _ in range(2):
        return_memory()
        before = _held(options.device)
        with products(job, options.device.type):
            loss = parts.objective(**inputs)
        loss.backward()
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        del loss
    print(peak_bytes(options.device) - before)
    return 0


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    sys.exit(main())
