"""The GPU that a benchmark runs on: whether there is one, its name, its driver, and how fast it copies."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.timing import Stopwatch

COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}
ROUNDS = 20


@dataclass(frozen=True)
class Rates:
    """Bytes in a second: of a copy on the device, read and written bytes counted, and from pinned RAM."""

    device: float
    host: float

    @classmethod
    def of(cls, device: torch.device) -> Rates:
        """Measured."""
        size, stopwatch = COPIED_BYTES[device.type], Stopwatch(device)
        here, there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        copies = (partial(there.copy_, here), partial(there.copy_, host, True))
        times = [[stopwatch.time(copy).busy for _ in range(ROUNDS)] for copy in copies]
        copy, transfer = map(statistics.median, times)
        return cls(2 * size / copy, size / transfer)


def on_cuda(argv: list[str] | None) -> list[str]:
    """The command line, for a GPU unless another device is asked for."""
    return ["--device", "cuda", *(sys.argv[1:] if argv is None else argv)]


def is_missing(device: torch.device) -> bool:
    """Say so where the device is not there."""
    if device.type != "cuda" or torch.cuda.is_available():
        return False
    print("Nothing was measured: torch finds no CUDA device here.", file=sys.stderr)
    return True


def file_name(suite: str, device: torch.device, *parts: str) -> str:
    """Of the results: suite, device, and the rest."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "-".join((suite, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), *parts))


def versions() -> str:
    """The driver's, and that of the CUDA torch was built for."""
    return f"driver {_driver()}; CUDA of torch: {torch.version.cuda}"


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)  # noqa: S603
    return found.stdout.partition("\n")[0] or "unknown"
