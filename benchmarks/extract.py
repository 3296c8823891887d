"""Extraction of a LoRA from two SD1.5-size checkpoints, and its decomposition of single layers beside a complete one.

The tuned checkpoint is the base with a change of falling singular values in every layer, rounded to fp16. The peer's
arithmetic is kohya's: `torch.linalg.svd` with full matrices, of which the first columns are kept. It is timed on one
layer of each size, each time counted for all layers of that size; the largest takes minutes and 5 GB.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks import checkpoints, synthetic
from benchmarks.common import DTYPES, Claim, Options, Report, Table, lora_folder, parse_options, seconds
from benchmarks.merge import Job
from benchmarks.timing import Stopwatch
from lib_lora.core.files import map_checkpoint
from lib_lora.core.saving import LazyTensor, save_tensors
from lib_lora.tools.difference import open_pair
from lib_lora.tools.extract import extract
from lib_lora.tools.svd import truncated_dense

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lib_lora.tools.difference import LayerPair

RANK, CONV_RANK = 32, 16
SMALL_RANK = 4
TERMS, FALL, STRENGTH = 256, 0.6, 0.05
"""Of a layer's change: the number of its parts, how fast their sizes fall, and its norm in units of the weight's."""
ROUNDS = 3
LARGE = 2_000_000
"""Numbers of a layer whose complete decomposition is timed once."""
FASTER, MOST_ERROR = 20, 1.001


class Size(NamedTuple):
    """What layers of one size have in common."""

    rows: int
    columns: int
    rank: int


@dataclass(frozen=True)
class Measured:
    """One layer of a size.

    Attributes:
        count: Layers of the size in the model.
        ours: Seconds.
        complete: Seconds of the complete decomposition.
        ratio: Our error in units of the least that is possible.
    """

    size: Size
    count: int
    ours: float
    complete: float
    ratio: float

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        rows, columns, rank = self.size
        times = seconds(self.ours), seconds(self.complete), f"{self.complete / self.ours:.1f}"
        return f"{rows} x {columns}", str(rank), str(self.count), *times, f"{self.ratio:.6f}"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("extract", __doc__.splitlines()[0], argv, ("fp16",))
    for dtype in options.dtypes:
        report = Report("extract", options, dtype)
        with lora_folder() as folder:
            base, tuned = write_pair(folder, options.model, DTYPES[dtype])
            _measure_job(options, report, base, tuned, folder / "lora.safetensors")
            if not options.alone:
                _measure_layers(options, report, base, tuned)
        report.save()
    return 0


def write_pair(folder: Path, model: str, dtype: torch.dtype) -> tuple[Path, Path]:
    """Base and tuned checkpoint."""
    base = checkpoints.write_checkpoint(folder / "base.safetensors", checkpoints.make_model(model), dtype)
    changed = {pair.layer.parameter for pair in open_pair(base, base, convolutions=True).layers}
    weights = map_checkpoint(base)
    generator = torch.Generator().manual_seed(synthetic.SEED)
    tensors = {name: _tuned(weights, name, generator) if name in changed else weights[name] for name in weights}
    save_tensors(folder / "tuned.safetensors", tensors)
    return base, folder / "tuned.safetensors"


def _tuned(weights: Mapping[str, Tensor], name: str, generator: torch.Generator) -> LazyTensor:
    weight = weights[name]

    def make() -> Tensor:
        rows, columns = len(weight), weight[0].numel()
        terms = min(rows, columns, TERMS)
        sizes = torch.arange(1, terms + 1) ** -FALL
        change = (
            torch.randn(rows, terms, generator=generator) * sizes @ torch.randn(terms, columns, generator=generator)
        )
        plain = weight.float()
        return (plain + change.view(weight.shape) * (STRENGTH * plain.norm() / change.norm())).to(weight.dtype)

    return LazyTensor(weight.dtype, tuple(weight.shape), make)


def _ranks(options: Options) -> tuple[int, int]:
    return (SMALL_RANK, SMALL_RANK) if options.model == "small" else (RANK, CONV_RANK)


def _measure_job(options: Options, report: Report, base: Path, tuned: Path, out: Path) -> None:
    """The whole of it, in a process of its own."""
    rank, conv_rank = _ranks(options)
    code = "import sys; from benchmarks.extract import run_case; run_case(*sys.argv[1:])"
    arguments = [str(base), str(tuned), str(rank), str(conv_rank), str(options.device), str(torch.get_num_threads())]
    job = Job(f"rank {rank}, convolutions {conv_rank}", [sys.executable, "-c", code, *arguments])
    for _ in range(options.rounds(ROUNDS)):
        job.run(out)
        out.unlink()
    columns = ("job", "wall", "of it after Python's start", "CPU time", "peak memory, mapped files included")
    report.add(Table("Extraction of a whole LoRA", columns, [job.cells()]))


def run_case(base: str, tuned: str, rank: str, conv_rank: str, device: str, threads: str, out: str) -> None:
    """The child process: extract, print the seconds in JSON."""
    torch.set_num_threads(int(threads))
    ranks = {"rank": int(rank), "conv_rank": int(conv_rank)}
    sample = Stopwatch(torch.device(device)).time(
        lambda: extract(Path(base), Path(tuned), Path(out), **ranks, dtype=torch.float16, device=device)
    )
    print(json.dumps({"seconds": sample.wall}))


def _measure_layers(options: Options, report: Report, base: Path, tuned: Path) -> None:
    sizes: dict[Size, list[LayerPair]] = {}
    for pair in open_pair(base, tuned, convolutions=True).layers:
        sizes.setdefault(_size(pair, options), []).append(pair)
    measured = [_measure(options, size, pairs) for size, pairs in sorted(sizes.items())]
    ours, complete = (sum(row.count * getattr(row, name) for row in measured) for name in ("ours", "complete"))
    columns = ("layer", "rank", "layers", "ours", "complete SVD", "times faster", "error / least error")
    notes = (f"all {sum(row.count for row in measured)} layers: {seconds(ours)}, complete {seconds(complete)}",)
    claims = (
        Claim("times as fast as a complete SVD, all layers", complete / ours, FASTER, at_most=False),
        Claim("error in units of the least of the rank, worst layer", max(row.ratio for row in measured), MOST_ERROR),
    )
    report.add(Table("Decomposition of a layer of each size", columns, [row.cells for row in measured], notes), claims)


def _size(pair: LayerPair, options: Options) -> Size:
    rank, conv_rank = _ranks(options)
    kernel = math.prod(pair.layer.shape[2:])
    return Size(pair.layer.shape[0], math.prod(pair.layer.shape[1:]), conv_rank if kernel > 1 else rank)


def _measure(options: Options, size: Size, pairs: Sequence[LayerPair]) -> Measured:
    change, stopwatch = pairs[0].difference(options.device), Stopwatch(options.device)
    factors = truncated_dense(change, size.rank)  # libraries start up
    rounds = options.rounds(ROUNDS)
    ours = [stopwatch.time(lambda: truncated_dense(change, size.rank)).wall for _ in range(rounds)]
    peers = 1 if change.numel() > LARGE else rounds
    complete = [stopwatch.time(lambda: _complete(change, size.rank)).wall for _ in range(peers)]
    exact = change.double()
    squares = torch.linalg.eigvalsh(exact @ exact.T if size.rows <= size.columns else exact.T @ exact)
    error = torch.linalg.matrix_norm(exact - factors.up.double() @ factors.down.double()).item()
    return Measured(size, len(pairs), median(ours), median(complete), error / squares[: -size.rank].sum().sqrt().item())


def _complete(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Kohya's way."""
    left, values, right = torch.linalg.svd(change, full_matrices=True)
    return left[:, :rank] @ torch.diag(values[:rank]), right[:rank]


if __name__ == "__main__":
    sys.exit(main())
