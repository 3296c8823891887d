"""What every benchmark shares: its options, the machine it ran on, and how its results are written."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.synthetic import KINDS, MODELS, target_weights
from lib_lora import LoraSession
from lib_lora.catalog import LoraCatalog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffusers import UNet2DConditionModel
    from torch import Tensor, nn

    from benchmarks.synthetic import LoraSet

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("torch", "diffusers", "peft", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Options:
    """What a suite is asked to measure.

    Attributes:
        device: Where the model lives.
        dtypes: Names in `DTYPES`; each gets its own results.
        kinds: Names in `synthetic.KINDS`.
        model: Name in `synthetic.MODELS`.
        repeats: Factor on the suite's own numbers of rounds.
        out: Folder of the results, or None to print only.
        stem: First part of the results' file names.
        command: What was typed.
        alone: Whether peers are left out.
    """

    device: torch.device
    dtypes: tuple[str, ...]
    kinds: tuple[str, ...]
    model: str
    repeats: float
    out: Path | None
    stem: str
    command: str
    alone: bool = False

    def rounds(self, count: int) -> int:
        """`count` rounds, or what was asked for instead."""
        return max(1, round(count * self.repeats))


@dataclass(frozen=True)
class Claim:
    """A promise and what was measured.

    Attributes:
        text: What is promised.
        measured: The number.
        target: What it must reach.
        at_most: Whether the target is an upper bound (else a lower one).
        detail: Spread, or the numbers behind it.
    """

    text: str
    measured: float
    target: float
    at_most: bool = True
    detail: str = ""

    @property
    def met(self) -> bool:
        """Whether the promise holds."""
        return self.measured <= self.target if self.at_most else self.measured >= self.target


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"### {self.title}", "", _row(self.columns), "|" + "---|" * len(self.columns)]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes)])


@dataclass
class Report:
    """All results of one suite on one device and dtype.

    Attributes:
        versions: Of what was measured, if that runs in another interpreter.
        file: Name of the results' files, if there is one device and one dtype only.
    """

    suite: str
    options: Options
    dtype: str
    versions: dict[str, str] | None = None
    file: str = ""
    tables: list[Table] = field(default_factory=list[Table])
    claims: list[Claim] = field(default_factory=list[Claim])

    def add(self, table: Table, claims: Sequence[Claim] = ()) -> None:
        """Keep and print a finished table and what it says about the claims."""
        self.tables.append(table)
        self.claims.extend(claims)
        print(f"\n{table.markdown()}", flush=True)
        for claim in claims:
            print(_claim_line(claim), flush=True)

    def save(self) -> None:
        """Write Markdown and JSON, if a folder was given."""
        if self.options.out is None:
            return
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / (self.file or f"{self.options.stem}-{self.options.device.type}-{self.dtype}")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {path}.md, {path.name}.json", flush=True)

    def facts(self) -> dict[str, Any]:
        """Date, machine and versions."""
        facts = describe_machine(self.options.device)
        return facts | {"versions": self.versions or facts["versions"]}

    def to_dict(self) -> dict[str, object]:
        """Everything, for JSON."""
        return {
            "suite": self.suite,
            "device": self.options.device.type,
            "dtype": self.dtype,
            "model": self.options.model,
            "command": self.options.command,
            **self.facts(),
            "claims": [{**asdict(claim), "met": claim.met} for claim in self.claims],
            "tables": [asdict(table) for table in self.tables],
        }

    def markdown(self) -> str:
        """Everything, for people."""
        facts = self.facts()
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        head = [
            f"# {self.suite}: {self.options.model}, {self.options.device.type}, {self.dtype}",
            "",
            f"{facts['date']}, {facts['machine']}  ",
            f"{versions}  ",
            f"`{self.options.command}`",
        ]
        claims = ["## Claims", "", "| claim | measured | target | met |", "|---|---|---|---|"]
        claims += [_row(_claim_cells(claim)) for claim in self.claims]
        return "\n".join([*head, "", *claims, "", "## Tables", "", *(table.markdown() + "\n" for table in self.tables)])


def parse_options(
    suite: str, description: str, argv: Sequence[str] | None, dtypes: Sequence[str], model: str = "sd15"
) -> Options:
    """Read a suite's command line; sets the number of threads.

    Args:
        suite: Name of the module.
        description: First line of ``--help``.
        argv: Arguments, or None for the process's own.
        dtypes: What is measured if nothing is asked for.
        model: The same for the shape of the model.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{suite}", description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default=",".join(dtypes), help=f"one or more of {', '.join(DTYPES)}, with commas")
    parser.add_argument("--model", default=model, choices=MODELS, help=f"shape of the model (default {model})")
    parser.add_argument("--kind", choices=KINDS, help="only this kind of LoRA; it becomes part of the results' name")
    parser.add_argument("--alone", action="store_true", help="without the peers, where a suite has some")
    parser.add_argument("--tiny", action="store_true", help="a check that it runs: small model, nothing is written")
    parser.add_argument("--repeats", type=float, default=1.0, help="factor on the number of rounds (default 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's)")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results)")
    given = parser.parse_args(argv)
    names = tuple(given.dtype.split(","))
    if unknown := set(names) - DTYPES.keys():
        parser.error(f"unknown dtype {', '.join(unknown)}; choose from {', '.join(DTYPES)}")
    if given.threads:
        torch.set_num_threads(given.threads)
    out = given.out or (None if given.tiny else RESULTS)
    command = " ".join([parser.prog, *(argv if argv is not None else sys.argv[1:])])
    shape = "small" if given.tiny else given.model
    stem = "-".join(filter(None, (suite, shape if shape != model else "", (given.kind or "").lower())))
    kinds = (given.kind,) if given.kind else KINDS
    return Options(torch.device(given.device), names, kinds, shape, given.repeats, out, stem, command, given.alone)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Date, machine and versions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "not run on a GPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    cpu = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, {memory:.0f} GiB"
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{cpu}; {gpu}; {platform.system()}",
        "versions": versions,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


@contextmanager
def lora_folder() -> Iterator[Path]:
    """A folder for LoRA files that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="prefuse-bench-") as folder:
        yield Path(folder)


@dataclass(frozen=True)
class TwoSets:
    """One model, and the files of two sets of LoRAs that it is switched between."""

    options: Options
    dtype: str
    kind: str
    folder: Path
    unet: UNet2DConditionModel
    sets: tuple[LoraSet, LoraSet]

    @property
    def weights(self) -> list[Tensor]:
        """The weights both sets touch."""
        return target_weights(self.unet, self.kind)


class Ours:
    """A LoraSession over a bare UNet and a folder of LoRA files, with the verbs of the peers."""

    def __init__(self, unet: nn.Module, folder: Path, **options: Any) -> None:
        self.session = LoraSession({"unet": unet}, LoraCatalog([folder]), **options)
        self._tuning = ExitStack()

    def switch(self, loras: LoraSet) -> None:
        """Set, and refuse to time a set that is not whole."""
        self._tuning.close()
        report = self.session.set(list(loras))
        if report.refused or len(report.applied) != len(loras):
            raise RuntimeError(f"not applied: {report}")

    def tuner(self, loras: LoraSet, name: str) -> Callable[[float], None]:
        """Set, and prepare to change one strength again and again, until the next `switch`."""
        self.switch(loras)
        return self._tuning.enter_context(self.session.tuning(name))

    def clear(self) -> None:
        """Base weights back."""
        self.session.clear()

    def unload(self) -> None:
        """Base weights back, memory free."""
        self._tuning.close()
        self.session.unload()


def seconds(value: float) -> str:
    """A time that a person reads at a glance."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def busy_label(options: Options) -> str:
    """What `Sample.busy` is on this device."""
    return "GPU time" if options.device.type == "cuda" else "CPU time, all threads"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _claim_cells(claim: Claim) -> tuple[str, str, str, str]:
    sign = "≤" if claim.at_most else "≥"
    detail = f" {claim.detail}" if claim.detail else ""
    return claim.text, f"{claim.measured:.3g}{detail}", f"{sign} {claim.target:g}", "yes" if claim.met else "**no**"


def _claim_line(claim: Claim) -> str:
    text, measured, target, _ = _claim_cells(claim)
    return f"{'ok  ' if claim.met else 'MISS'} {text}: {measured}, target {target}"
