"""Time of a set switch, of one strength's change, of a restore, and of five files until they are fused.

Five LoRAs of rank 32 (fp16 files) are replaced by five others on an SD1.5-shaped UNet; the WebUI's and ComfyUI's
algorithms and diffusers' own API do the same beside us, each in turns with us.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import synthetic
from benchmarks.common import (
    DTYPES,
    Claim,
    Ours,
    Report,
    Table,
    TwoSets,
    busy_label,
    lora_folder,
    parse_options,
    seconds,
)
from benchmarks.peers import ComfyAlgorithm, DiffusersApi, GemmFloor, WebuiAlgorithm
from benchmarks.timing import Case, Stopwatch, ratio, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffusers import UNet2DConditionModel
    from torch import Tensor, nn

    from benchmarks.peers import Networks, Switcher
    from benchmarks.synthetic import LoraSet

SET_SIZE = 5
ROUNDS = {"LierLa": 10, "C3Lier": 5}
PEER_ROUNDS = {"LierLa": 4, "C3Lier": 2}
PEERS: dict[str, Callable[[UNet2DConditionModel, Networks], Switcher]] = {
    "WebUI 1.10 algorithm": WebuiAlgorithm,
    "ComfyUI algorithm": ComfyAlgorithm,
    "ComfyUI algorithm, in place": partial(ComfyAlgorithm, in_place=True),
    "diffusers unfuse + fuse": DiffusersApi,
}
TIMES_FASTER = {
    "fp32": {"WebUI 1.10 algorithm": 5.0, "ComfyUI algorithm": 2.5, "diffusers unfuse + fuse": 4.0},
    "bf16": {"WebUI 1.10 algorithm": 3.0, "ComfyUI algorithm": 4.0, "diffusers unfuse + fuse": 10.0},
}
CHECKED_LAYERS = 8
LARGEST_ERROR = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}
"""Largest difference to the float64 sum, in units of the layer's largest weight; more means other work was done."""


@dataclass(frozen=True)
class Bench(TwoSets):
    """With what times are taken."""

    stopwatch: Stopwatch

    def networks(self) -> Networks:
        """The files as the peers keep them: in memory, in the model's dtype."""
        layers = list(synthetic.target_layers(self.unet, self.kind))
        return {
            name: synthetic.read_factors(
                self.folder / f"{name}.safetensors", layers, DTYPES[self.dtype], self.options.device
            )
            for loras in self.sets
            for name, _ in loras
        }


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("switch", __doc__.splitlines()[0], argv, ("fp32", "bf16"))
    for dtype in options.dtypes:
        report = Report("switch", options, dtype)
        unet = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
        for kind in options.kinds:
            with lora_folder() as folder:
                ranks = (synthetic.RANK,) * SET_SIZE
                sets = tuple(synthetic.write_loras(folder, unet, kind, ranks, prefix) for prefix in "ab")
                bench = Bench(options, dtype, kind, folder, unet, sets, Stopwatch(options.device))
                measure_ourselves(bench, report)
                if not options.alone:
                    measure_peers(bench, report)
        report.save()
    return 0


def measure_ourselves(bench: Bench, report: Report) -> None:
    """Our times beside the floors of the same machine."""
    ours = Ours(bench.unet, bench.folder)
    floor = GemmFloor(bench.unet, bench.kind, bench.networks(), bench.sets)
    cases = _our_cases(bench, ours, floor)
    take_turns(list(cases.values()), bench.options.rounds(ROUNDS[bench.kind]), bench.stopwatch)
    ours.unload()
    full = cases["switch"]
    rows = [(case.name, seconds(case.wall), seconds(case.busy), str(ratio(case, full))) for case in cases.values()]
    layers, size = len(bench.weights), sum(weight.nbytes for weight in bench.weights) / 1e6
    title = f"{bench.kind}, {SET_SIZE} LoRAs of rank {synthetic.RANK}: {layers} layers, {size:.0f} MB of weights"
    columns = ("ours and the floors", "wall", busy_label(bench.options), "times the set switch (quartiles)")
    notes = (f"medians of {len(full.samples)} rounds, all in each",)
    report.add(Table(title, columns, rows, notes), _our_claims(bench, cases))


def _our_cases(bench: Bench, ours: Ours, floor: GemmFloor) -> dict[str, Case]:
    first, second = bench.sets
    reset = partial(ours.switch, first)
    tuner = Tuner(ours, first)
    changed = tuple((name, strength + 0.05 * (i == 2)) for i, (name, strength) in enumerate(first))
    return {
        "switch": Case(f"set switch {SET_SIZE} → {SET_SIZE}", partial(ours.switch, second), reset),
        "gemm": Case("floor: one addmm a layer", partial(floor.switch, second)),
        "one": Case(f"one strength of {SET_SIZE} changed, exact", partial(ours.switch, changed), reset),
        "tune": Case(f"one strength of {SET_SIZE} changed, slider (`tuning`)", tuner, tuner.prepare),
        "files": Case(f"{SET_SIZE} files in page cache → fused", partial(ours.switch, second), _renewed(bench, reset)),
        "restore": Case("restore", ours.clear, reset),
        "copy": Case("floor: plain copy of the same bytes", floor.clear),
    }


class Tuner:
    """Turns the strength of a set's third LoRA, as a slider would."""

    def __init__(self, ours: Ours, loras: LoraSet) -> None:
        self._ours, self._loras = ours, loras
        self._turn: Callable[[float], None] | None = None

    def prepare(self) -> None:
        """Fuse the others."""
        self._turn = self._ours.tuner(self._loras, self._loras[2][0])

    def __call__(self) -> None:
        """One turn."""
        if self._turn is not None:
            self._turn(self._loras[2][1] + 0.05)


def _renewed(bench: Bench, reset: Callable[[], None]) -> Callable[[], None]:
    """Make the second set's files new to the session, though not to the page cache."""

    def renew() -> None:
        reset()
        for name, _ in bench.sets[1]:
            os.utime(bench.folder / f"{name}.safetensors")
        time.sleep(0.1)  # a file that was written to just now is read with care, and later

    return renew


def _our_claims(bench: Bench, cases: dict[str, Case]) -> list[Claim]:
    pairs = [
        ("set switch / GEMM floor", "switch", "gemm", 1.15),
        ("one strength of five, slider / set switch", "tune", "switch", 0.35),
        ("one strength of five, exact / set switch", "one", "switch", 0.35),
        ("restore / plain copy", "restore", "copy", 1.2),
        ("five files in page cache → fused / set switch", "files", "switch", 1.5),
    ]
    if bench.options.device.type == "cuda":
        pairs[0] = ("set switch / memory floor (plain copy)", "switch", "copy", 3.0)
    measured = ((text, ratio(cases[case], cases[reference]), target) for text, case, reference, target in pairs)
    return [
        Claim(f"{bench.kind}: {text}", value.median, target, detail=value.range) for text, value, target in measured
    ]


def measure_peers(bench: Bench, report: Report) -> None:
    """Each peer's time in turns with ours; each has weights of its own."""
    networks = bench.networks()
    checked = list(synthetic.target_layers(bench.unet, bench.kind))[:: max(1, len(bench.weights) // CHECKED_LAYERS)]
    sums = _float64_sums(bench, checked, networks)
    rows: list[tuple[str, ...]] = []
    claims: list[Claim] = []
    for name, make in PEERS.items():
        ours_case, peer_case, errors = _against(bench, name, partial(make, networks=networks), sums)
        faster = ratio(peer_case, ours_case)
        times = (seconds(case.wall) for case in (peer_case, ours_case))
        rows.append((name, *times, seconds(peer_case.busy), f"{faster}", *(f"{error:.1e}" for error in errors)))
        if target := TIMES_FASTER.get(bench.dtype, {}).get(name) if bench.options.device.type == "cpu" else None:
            text = f"{bench.kind}: times faster than {name}"
            claims.append(Claim(text, faster.median, target, at_most=False, detail=faster.range))
    columns = ("peer", "wall", "ours in turns", busy_label(bench.options), "we are faster by", "its error", "our error")
    notes = (
        f"{bench.options.rounds(PEER_ROUNDS[bench.kind])} rounds each",
        f"error: largest difference to the float64 sum after the last switch, in units of the largest weight, "
        f"over {len(checked)} layers",
    )
    report.add(Table(f"{bench.kind}: set switch {SET_SIZE} → {SET_SIZE} beside others", columns, rows, notes), claims)


def _against(
    bench: Bench, name: str, make: Callable[[UNet2DConditionModel], Switcher], sums: dict[str, Tensor]
) -> tuple[Case, Case, tuple[float, float]]:
    """Our case, the peer's, and (its error, our error)."""
    unet = synthetic.sibling(bench.unet, bench.weights)
    layers = [{path: root.get_submodule(path) for path in sums} for root in (unet, bench.unet)]
    peer, ours = make(unet), Ours(bench.unet, bench.folder)
    cases = [Case(label, _taking_turns(who, bench.sets)) for label, who in (("ours", ours), (name, peer))]
    take_turns(cases, bench.options.rounds(PEER_ROUNDS[bench.kind]), bench.stopwatch)
    for who in (peer, ours):
        who.switch(bench.sets[0])
    errors = tuple(_error(bench, found, sums) for found in layers)
    ours.unload()
    return cases[0], cases[1], errors


def _taking_turns(who: Switcher, sets: tuple[LoraSet, LoraSet]) -> Callable[[], None]:
    """An action that switches to the other set each time."""
    following = itertools.cycle(sets)
    return lambda: who.switch(next(following))


def _float64_sums(bench: Bench, names: Sequence[str], networks: Networks) -> dict[str, Tensor]:
    """Layer → base + Σ strength · scale · up @ down of the first set, computed in float64."""
    sums: dict[str, Tensor] = {}
    for name in names:
        total = bench.unet.get_submodule(name).weight.double().flatten(1)
        for lora, strength in bench.sets[0]:
            up, down, scale = networks[lora][name]
            total.addmm_(up.flatten(1).double(), down.flatten(1).double(), alpha=scale * strength)
        sums[name] = total
    return sums


def _error(bench: Bench, layers: dict[str, nn.Module], sums: dict[str, Tensor]) -> float:
    """Largest difference to the sums, in units of the largest weight of the layer."""
    weights = {name: layers[name].weight.flatten(1).double() for name in sums}
    largest = max(((weights[name] - total).abs().max() / total.abs().max()).item() for name, total in sums.items())
    allowed = LARGEST_ERROR[bench.dtype]
    if not largest < allowed:
        raise RuntimeError(f"a method is off by {largest:.1e}; allowed in {bench.dtype}: {allowed:.0e}")
    return largest


if __name__ == "__main__":
    sys.exit(main())
