"""Merging LoRAs into a checkpoint in fp16, beside a plain copy of the file and beside kohya's way to do it.

Every job is a process of its own, from its start to its end, Python and libraries included, as a user waits for it.
A copy with fsync is the floor: what is on the disk afterwards has as many bytes. Jobs take turns; the output of each is
removed before the next. Memory is the largest resident set that the system counted, mapped pages of files included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import checkpoints, synthetic
from benchmarks.common import Claim, Options, Report, Table, lora_folder, parse_options, seconds
from benchmarks.timing import Ratio, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
STRENGTHS = (0.8, 0.5, -0.3)
PEER = "kohya's way"
LIMITS = {"sdxl": (1.5, None, 1.2)}
"""Model → largest ratio to the copy, CPU seconds, GB; others have SD1.5's."""
SD15_LIMITS = (1.5, 4.0, 1.0)
MOST_FOR_THREE = 1.3


class Usage(NamedTuple):
    """What one process took: seconds by the clock, of the processor, and GB at most."""

    wall: float
    busy: float
    peak: float


@dataclass
class Job:
    """Something that is measured.

    Attributes:
        name: What the tables call it.
        command: What is run; the output's path is added.
        usages: One a round.
        inner: Seconds that the command itself reported, without Python's start.
    """

    name: str
    command: list[str]
    usages: list[Usage] = field(default_factory=list[Usage])
    inner: list[float] = field(default_factory=list[float])

    def run(self, out: Path) -> None:
        """Once, in a process of its own."""
        command = [sys.executable, "-c", MEASURE, *self.command, str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise RuntimeError(f"{self.name} failed: {done.stderr[-500:]}")
        *told, usage = done.stdout.splitlines()
        self.usages.append(Usage(*json.loads(usage)))
        if told:
            self.inner.append(json.loads("\n".join(told))["seconds"])

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        inner = seconds(median(self.inner)) if self.inner else ""
        walls = spread([usage.wall for usage in self.usages])
        wall = f"{seconds(walls.median)} ({walls.low:.2f} to {walls.high:.2f})"
        return self.name, wall, inner, seconds(median(u.busy for u in self.usages)), f"{self.peak:.2f} GB"

    @property
    def busy(self) -> float:
        """Median seconds of the processor."""
        return median(usage.busy for usage in self.usages)

    @property
    def peak(self) -> float:
        """The most memory of all rounds in GB."""
        return max(usage.peak for usage in self.usages)


def main(argv: Sequence[str] | None = None) -> int:
    if not hasattr(os, "wait4"):
        print("processes are measured on Linux and macOS only", file=sys.stderr)
        return 1
    options = parse_options("merge", __doc__.splitlines()[0], argv, ("fp16",))
    report = Report("merge", options, "fp16", file=options.stem)
    with lora_folder() as folder:
        jobs, size = _jobs(options, folder)
        floor, start, one, three, *peers = jobs
        for _ in range(-1, options.rounds(ROUNDS)):
            _round((floor, start, one, three), folder / "out.safetensors")
        for job in (floor, start, one, three):
            del job.usages[0]  # the first round fills the page cache
        _round(peers, folder / "out.safetensors")
    columns = ("job", "wall", "of it after Python's start", "CPU time", "peak memory")
    once = f"; {PEER}: one" if peers else ""
    notes = (f"{size / 1e9:.2f} GB; medians of {len(one.usages)} rounds with quartiles{once}",)
    report.add(Table("Merge and save in fp16", columns, [job.cells() for job in jobs], notes), _claims(options, *jobs))
    report.save()
    return 0


def _jobs(options: Options, folder: Path) -> tuple[list[Job], int]:
    model = checkpoints.make_model(options.model)
    checkpoint = checkpoints.write_checkpoint(folder / "model.safetensors", model)
    loras = [checkpoints.write_lora(folder / f"lora{number}.safetensors", model) for number in range(len(STRENGTHS))]
    given = [f"{path}:{strength}" for path, strength in zip(loras, STRENGTHS, strict=True)]
    merge = [sys.executable, "-m", "lib_lora", "merge", "--json", "--model", str(checkpoint), "--out"]

    def merging(count: int) -> list[str]:
        return [*merge[:-1], *(part for text in given[:count] for part in ("--lora", text)), "--out"]

    jobs = [
        Job("floor: copy of the file and fsync", [sys.executable, "-c", COPY, str(checkpoint)]),
        Job("start of Python and torch alone", [sys.executable, "-c", "import torch"]),
        Job(f"merge 1 LoRA of rank {synthetic.RANK}", merging(1)),
        Job("merge 3 LoRAs", merging(3)),
    ]
    if not options.alone:
        jobs.append(Job(f"{PEER}: 1 LoRA", [sys.executable, "-m", "benchmarks.kohya_merge", str(checkpoint), given[0]]))
    return jobs, checkpoint.stat().st_size


MEASURE = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - start
if status:
    sys.exit(1)
print(json.dumps([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9]))
"""
"""A small process between: a child begins with the memory of its parent, which here would be the largest."""

COPY = """
import os, shutil, sys
shutil.copyfile(sys.argv[1], sys.argv[2])
with open(sys.argv[2], "r+b") as file:
    os.fsync(file.fileno())
"""


def _round(jobs: Sequence[Job], out: Path) -> None:
    for job in jobs:
        out.unlink(missing_ok=True)
        os.sync()
        job.run(out)


def _claims(options: Options, floor: Job, _: Job, one: Job, three: Job, *peers: Job) -> list[Claim]:
    most, cpu, memory = LIMITS.get(options.model, SD15_LIMITS)
    to_copy, to_one = _ratio(one, floor), _ratio(three, one)
    claims = [
        Claim("1 LoRA / copy and fsync", to_copy.median, most, detail=to_copy.range),
        Claim("1 LoRA: peak memory in GB", one.peak, memory),
        Claim("3 LoRAs / 1 LoRA", to_one.median, MOST_FOR_THREE, detail=to_one.range),
    ]
    if cpu is not None:
        claims.insert(1, Claim("1 LoRA: CPU seconds", one.busy, cpu))
    for peer in peers:
        faster = median(usage.wall for usage in peer.usages) / median(usage.wall for usage in one.usages)
        claims.append(Claim(f"times faster than {PEER}", faster, 1.0, at_most=False))
    return claims


def _ratio(job: Job, reference: Job) -> Ratio:
    return spread([a.wall / b.wall for a, b in zip(job.usages, reference.usages, strict=True)])


if __name__ == "__main__":
    sys.exit(main())
