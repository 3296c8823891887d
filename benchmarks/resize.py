"""Time of changing a LoRA's ranks and of combining LoRAs, beside reading the file and beside the SVD of the products.

Files of real size: C3Lier of an SD1.5-shaped UNet in fp16, random numbers, which are the slowest to cut: no layer has
a lower rank than its file says. Everything from a path to a verified file on the disk is timed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks import synthetic
from benchmarks.common import Claim, Options, Report, Table, lora_folder, parse_options, seconds
from benchmarks.timing import Case, Stopwatch, ratio, take_turns
from lib_lora.core.adapters import Factors
from lib_lora.core.network import load_network
from lib_lora.tools.combine import combine
from lib_lora.tools.factored import stacked, truncated
from lib_lora.tools.given import given_files
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.resize import resize

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KIND = "C3Lier"
LARGE, SMALL, RANK = 128, 16, 32
ROUNDS = 5
SAMPLED = 40
"""Every so many layers are cut by the SVD of their product too, which takes minutes for all."""
MOST_SECONDS = 3.0
LEAST_GAIN = 20.0
_linalg: Any = torch.linalg


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("resize", __doc__.splitlines()[0], argv, ("fp16",))
    report = Report("resize", options, "fp16")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**synthetic.MODELS[options.model])
    layers = synthetic.target_layers(unet, KIND)
    with lora_folder() as folder:
        for name, rank in (("large", LARGE), ("a", RANK), ("b", RANK)):
            synthetic.write_lora(folder / f"{name}.safetensors", layers, rank)
        _whole_files(options, folder, report)
        _one_by_one(options, folder, report)
    report.save()
    return 0


def _whole_files(options: Options, folder: Path, report: Report) -> None:
    large, out = folder / "large.safetensors", folder / "out.safetensors"
    both = given_files([f"{folder / 'a.safetensors'}:0.7", f"{folder / 'b.safetensors'}:-0.3"])
    dynamic = RankRule(SMALL, dynamic="sv_fro", parameter=0.5)
    cases = [
        Case(f"read rank {LARGE}", lambda: load_network(large)),
        Case(f"resize {LARGE} → {SMALL}", lambda: resize(large, out, RankRule(SMALL), overwrite=True)),
        Case(f"resize {LARGE} → sv_fro 0.5", lambda: resize(large, out, dynamic, overwrite=True)),
        Case(f"concat {RANK} + {RANK}", lambda: combine(both, out, overwrite=True)),
        Case(
            f"svd {RANK} + {RANK} → {RANK}",
            lambda: combine(both, out, method="svd", rule=RankRule(RANK), overwrite=True),
        ),
    ]
    take_turns(cases, options.rounds(ROUNDS), Stopwatch(torch.device("cpu")))
    rows = [(case.name, seconds(case.wall), seconds(case.busy)) for case in cases]
    size = large.stat().st_size / 1e6
    notes = (f"medians; the file of rank {LARGE} has {size:.0f} MB",)
    claim = Claim(f"{cases[1].name}: seconds", cases[1].wall, MOST_SECONDS, detail=f"({seconds(cases[1].busy)} of CPU)")
    report.add(Table(f"{KIND}, whole files", ("job", "time", "CPU time, all threads"), rows, notes), [claim])


def _one_by_one(options: Options, folder: Path, report: Report) -> None:
    """The same layers by QR of the factors and by the SVD of the product, as resize_lora.py computes it."""
    adapters = load_network(folder / "large.safetensors").adapters.values()
    sample = [adapter.factors() for adapter in list(adapters)[::SAMPLED]]
    ours = Case("QR of the factors", lambda: [_by_factors(low) for low in sample])
    theirs = Case("SVD of the product", lambda: [_by_product(low) for low in sample])
    take_turns([ours, theirs], options.rounds(1), Stopwatch(torch.device("cpu")), warmup=0)
    gain = ratio(theirs, ours)
    worst = max(
        (_error(low, _by_factors(low)) / _error(low, _by_product(low)) for low in sample),
    )
    rows = [(case.name, seconds(case.wall), seconds(case.busy)) for case in (ours, theirs)]
    notes = (f"{len(sample)} layers; kohya's script forms the full V besides, which is not done here",)
    claims = [
        Claim("times as fast as the SVD of the product", gain.median, LEAST_GAIN, at_most=False),
        Claim("largest error / that of the product's SVD", worst, 1.001),
    ]
    report.add(Table("a sample of layers", ("how", "time", "CPU time, all threads"), rows, notes), claims)


def _by_factors(low: Factors) -> Factors:
    return truncated(stacked([(low, 1.0)]), lambda values: SMALL).factors


def _by_product(low: Factors) -> Factors:
    u, values, vh = _linalg.svd(low.scale * (low.up.float() @ low.down.float()), full_matrices=False)
    return Factors(u[:, :SMALL] * values[:SMALL], vh[:SMALL], 1.0)


def _error(low: Factors, cut: Factors) -> float:
    whole = low.scale * (low.up.double() @ low.down.double())
    return (whole - cut.up.double() @ cut.down.double()).norm().item()


if __name__ == "__main__":
    sys.exit(main())
