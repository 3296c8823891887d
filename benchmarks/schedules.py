"""What strengths that move in time cost: a curve that moves at each step, and a LoRA that starts in mid-pass.

Five LoRAs of rank 32 (fp16 files) are fused into an SD1.5-shaped UNet; the strength of one of them changes. Beside us,
what others do who fuse: everything anew at each step.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

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
from benchmarks.peers import ComfyAlgorithm, DiffusersApi, WebuiAlgorithm
from benchmarks.timing import Case, Stopwatch, ratio, spread, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from diffusers import UNet2DConditionModel

    from benchmarks.peers import Networks, Switcher
    from benchmarks.synthetic import LoraSet

SET_SIZE = 5
STEPS = 20
ROUNDS = {"LierLa": 8, "C3Lier": 4}
PEER_ROUNDS = 1
PEERS: dict[str, Callable[[UNet2DConditionModel, Networks], Switcher]] = {
    "WebUI 1.10 algorithm": WebuiAlgorithm,
    "ComfyUI algorithm": ComfyAlgorithm,
    "diffusers unfuse + fuse": DiffusersApi,
}
LARGEST_PART = 0.35
"""Of a set switch, that a step of a curve may cost."""


@dataclass(frozen=True)
class Bench:
    """One model with five LoRAs, and five others to come from."""

    options: Options
    kind: str
    folder: Path
    unet: UNet2DConditionModel
    sets: tuple[LoraSet, LoraSet]
    stopwatch: Stopwatch

    def prompt(self, schedule: str) -> str:
        """The first set as tags, its third LoRA with a schedule in place of its strength."""
        tags = [f"<lora:{name}:{schedule if i == 2 else strength}>" for i, (name, strength) in enumerate(self.sets[0])]
        return "".join(tags)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("schedules", __doc__.splitlines()[0], argv, ("fp32", "bf16"))
    for dtype in options.dtypes:
        report = Report("schedules", options, dtype)
        unet = synthetic.make_unet(options.model, DTYPES[dtype], options.device)
        for kind in options.kinds:
            with lora_folder() as folder:
                ranks = (synthetic.RANK,) * SET_SIZE
                sets = tuple(synthetic.write_loras(folder, unet, kind, ranks, prefix) for prefix in "ab")
                bench = Bench(options, kind, folder, unet, sets, Stopwatch(options.device))
                measure_ourselves(bench, report)
                if not options.alone:
                    measure_peers(bench, report)
        report.save()
    return 0


class Pass:
    """A pass of `STEPS` steps without the model: what schedules add to it.

    Attributes:
        session: Ours.
    """

    def __init__(self, ours: Ours, prompt: str, other: LoraSet) -> None:
        self.session = ours.session
        self._ours, self._prompt, self._other = ours, prompt, other

    def prepare(self) -> None:
        """Another set is in the weights."""
        self._ours.switch(self._other)

    def begin(self) -> None:
        """As before step 0."""
        report = self.session.set(self._prompt)
        if report.refused or len(report.applied) != SET_SIZE:
            raise RuntimeError(f"not applied: {report}")

    def prepare_steps(self) -> None:
        """`prepare` and `begin`."""
        self.prepare()
        self.begin()

    def run(self) -> None:
        """All steps."""
        for step in range(STEPS):
            self.session.advance(step, STEPS)

    def prepare_one(self) -> None:
        """Moved once, to the step before the one in the middle."""
        self.prepare_steps()
        self.session.advance(STEPS // 2 - 1, STEPS)

    def run_one(self) -> None:
        """That step."""
        self.session.advance(STEPS // 2, STEPS)

    def whole(self) -> None:
        """Set and all steps: what a picture pays."""
        self.begin()
        self.run()


def measure_ourselves(bench: Bench, report: Report) -> None:
    """A step of a curve, a picture with one, and a picture with a late start, beside a set switch."""
    ours = Ours(bench.unet, bench.folder)
    curve = Pass(ours, bench.prompt("0.2@0,1@1"), bench.sets[1])
    late = Pass(ours, bench.prompt("1:start=0.5"), bench.sets[1])
    plain = Pass(ours, bench.prompt("1"), bench.sets[1])
    near = tuple((name, strength + 0.1 * (i == 2)) for i, (name, strength) in enumerate(bench.sets[0]))
    cases = {
        "switch": Case(f"set switch {SET_SIZE} → {SET_SIZE}", plain.begin, plain.prepare),
        "one": Case(f"partial switch: one strength of {SET_SIZE} by hand", partial(ours.switch, near), plain.begin),
        "step": Case("a step at which a curve moves", curve.run_one, curve.prepare_one),
        "curve": Case(f"curve, all {STEPS} steps", curve.run, curve.prepare_steps),
        "late": Case(f"start=0.5, set and all {STEPS} steps", late.whole, late.prepare),
    }
    told: dict[str, str] = {}
    for name, case, run in (("curve", cases["curve"], curve), ("late", cases["late"], late)):
        case.action = _and_tell(case.action, run, name, told)
    take_turns(list(cases.values()), bench.options.rounds(ROUNDS[bench.kind]), bench.stopwatch)
    ours.unload()
    full = cases["switch"]
    rows = [(case.name, seconds(case.wall), seconds(case.busy), str(ratio(case, full))) for case in cases.values()]
    columns = ("ours", "wall", busy_label(bench.options), "times the set switch (quartiles)")
    notes = (f"medians of {len(full.samples)} rounds, all in each", *(f"{name}: {text}" for name, text in told.items()))
    title = f"{bench.kind}, {SET_SIZE} LoRAs of rank {synthetic.RANK}, the strength of one moves"
    report.add(Table(title, columns, rows, notes), _our_claims(bench, cases))


def _and_tell(action: Callable[[], object], run: Pass, name: str, told: dict[str, str]) -> Callable[[], None]:
    """The action; what the session says of its LoRA that moves is kept."""

    def act() -> None:
        action()
        report = run.session.report
        ways = [lora.moving for lora in report.applied if lora.moving]
        told[name] = f"{'; '.join(ways)}; {report.held_bytes / 1e6:.0f} MB held"

    return act


def _our_claims(bench: Bench, cases: dict[str, Case]) -> list[Claim]:
    step, whole = ratio(cases["step"], cases["switch"]), ratio(cases["curve"], cases["switch"])
    triples = zip(cases["late"].samples, cases["switch"].samples, cases["one"].samples, strict=True)
    late = spread([(late.wall - switch.wall) / one.wall for late, switch, one in triples])
    pairs = [
        ("a step at which a curve moves / set switch", step.median, LARGEST_PART, step.range),
        (
            f"a curve's cost for each of {STEPS} steps, all told / set switch",
            whole.median / STEPS,
            LARGEST_PART,
            f"({whole.low / STEPS:.3g} to {whole.high / STEPS:.3g})",
        ),
        ("what start=0.5 adds to a picture / partial switch", late.median, 1.0, late.range),
    ]
    return [Claim(f"{bench.kind}: {text}", value, target, detail=detail) for text, value, target, detail in pairs]


def measure_peers(bench: Bench, report: Report) -> None:
    """A step of a curve, of others, who fuse all LoRAs anew: each beside ours, with weights of its own."""
    layers = list(synthetic.target_layers(bench.unet, bench.kind))
    networks = {
        name: synthetic.read_factors(
            bench.folder / f"{name}.safetensors", layers, bench.unet.dtype, bench.options.device
        )
        for name, _ in bench.sets[0]
    }
    rows: list[tuple[str, ...]] = []
    for name, make in PEERS.items():
        ours = Ours(bench.unet, bench.folder)
        curve = Pass(ours, bench.prompt("0.2@0,1@1"), bench.sets[1])
        peer = make(synthetic.sibling(bench.unet, synthetic.target_weights(bench.unet, bench.kind)), networks)
        peer.switch(bench.sets[0])
        near = tuple((lora, strength + 0.1 * (i == 2)) for i, (lora, strength) in enumerate(bench.sets[0]))
        own = Case("ours", curve.run_one, curve.prepare_one)
        other = Case(name, partial(peer.switch, near), partial(peer.switch, bench.sets[0]))
        take_turns([own, other], bench.options.rounds(PEER_ROUNDS), bench.stopwatch)
        ours.unload()
        rows.append((name, seconds(other.wall), seconds(own.wall), seconds(other.busy), str(ratio(other, own))))
    columns = ("peer", "wall", "ours in turns", busy_label(bench.options), "we are faster by")
    notes = (f"{bench.options.rounds(PEER_ROUNDS)} rounds each",)
    report.add(Table(f"{bench.kind}: a step at which a curve moves, beside others", columns, rows, notes))


if __name__ == "__main__":
    sys.exit(main())
