"""Steps and switches of a real WebUI whose UNet is compiled, beside one whose UNet is not.

Two WebUIs with the same models answer the same requests in turns: in one the setting "Compile the UNet" is inductor.
Needs a WebUI v1.10.1: its folder in ``WEBUI_ROOT``, its interpreter in ``WEBUI_PYTHON``.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import Claim, Report, Table, seconds
from benchmarks.timing import Case, Sample, spread, take_turns
from benchmarks.webui import (
    CHANNELS,
    MORE_STEPS,
    SIZE,
    STEPS,
    TEXT,
    Bench,
    options_of,
    parse,
    parser_of,
    tagged,
    versions_of,
)
from tests.webui_real.make_models import make_models
from tests.webui_real.server import WebUI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EAGER, COMPILED = "eager", "inductor"
SETTINGS = {EAGER: "off", COMPILED: "inductor"}
COUNT = 5
SWITCH_TIMES, LORA_TIMES = 1.1, 1.01
WARM_SECONDS = 3600.0


class Both:
    """The two WebUIs as one stopwatch.

    Attributes:
        benches: ``eager`` and ``inductor`` → requests to that WebUI.
    """

    def __init__(self, webuis: dict[str, WebUI]) -> None:
        self.benches = {name: Bench(webui) for name, webui in webuis.items()}

    def time(self, action: Callable[[], object]) -> Sample:
        """Wall time here, CPU time of both processes, one of which has nothing to do."""
        samples: list[Sample] = []
        first, last = self.benches.values()
        wall = time.perf_counter()
        samples.append(first.time(lambda: samples.append(last.time(action))))
        return Sample(time.perf_counter() - wall, sum(sample.busy for sample in samples))

    def step_cases(self) -> dict[tuple[str, int, int], Case]:
        """WebUI, number of LoRAs and number of steps → what is timed."""
        return {
            (name, count, steps): Case(
                name, partial(bench.draw, tagged(count), steps), partial(bench.draw, tagged(count))
            )
            for name, bench in self.benches.items()
            for count, steps in itertools.product((0, COUNT), (STEPS, MORE_STEPS))
        }

    def switch_cases(self) -> dict[tuple[str, str], Case]:
        """WebUI, and whether all strengths are changed → what is timed."""
        cases: dict[tuple[str, str], Case] = {}
        for name, bench in self.benches.items():
            there = partial(bench.draw, tagged(COUNT))
            cases[name, "same again"] = Case(name, there, there)
            cases[name, "switched"] = Case(name, partial(bench.draw, tagged(COUNT, 0.45)), there)
        return cases


def main(argv: Sequence[str] | None = None) -> int:
    given, python = parse(parser_of("webui_compile", __doc__), argv)
    options = options_of("webui_compile", given.channels, given.out)
    stem = "webui-compile" if given.channels == CHANNELS else f"webui-compile-{given.channels}"
    report = Report("webui_compile", options, "fp32", versions=versions_of(python), file=stem)
    with started(python, given.channels) as webuis:
        both = Both(webuis)
        warm_up(both.benches[COMPILED])
        measure_steps(both, report, given.rounds)
        measure_switches(both, report, given.rounds)
    report.save()
    return 0


@contextmanager
def started(python: str, channels: int) -> Iterator[dict[str, WebUI]]:
    """Both WebUIs, until the end of the block."""
    webuis: dict[str, WebUI] = {}
    with ExitStack() as stack:
        for name, setting in SETTINGS.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefuse-bench-")))
            make_models(folder, channels=channels)
            webui = webuis[name] = WebUI(Path(os.environ["WEBUI_ROOT"]), python, folder)
            webui.link_extension()
            stack.callback(webui.stop)
            webui.start()
            webui.options(samples_save=False, prefuse_compile=setting)
        yield webuis


def warm_up(bench: Bench) -> None:
    """Until a picture asks for nothing new."""
    asked, end = -1, time.monotonic() + WARM_SECONDS
    while compiled(bench)["asked"] > asked:
        asked = compiled(bench)["asked"]
        bench.draw(TEXT)
        while compiled(bench)["done"] < compiled(bench)["asked"]:
            if time.monotonic() > end:
                raise RuntimeError(f"not compiled in {WARM_SECONDS:.0f} s: {compiled(bench)['text']}")
            time.sleep(1)
        bench.draw(TEXT)
    if len(compiled(bench)["compiled"]) < compiled(bench)["blocks"]:
        raise RuntimeError(f"not compiled: {compiled(bench)['text']}")


def compiled(bench: Bench) -> dict:
    """What the WebUI's API tells of it."""
    return bench.webui.get("/prefuse/v1/state")["compiled"]


def measure_steps(both: Both, report: Report, rounds: int) -> None:
    """A step with none and with five LoRAs."""
    cases = both.step_cases()
    take_turns(list(cases.values()), rounds, both)
    step = {}
    for name, count in itertools.product(SETTINGS, (0, COUNT)):
        pairs = zip(cases[name, count, MORE_STEPS].samples, cases[name, count, STEPS].samples, strict=True)
        step[name, count] = [(more.busy - less.busy) / (MORE_STEPS - STEPS) for more, less in pairs]
    rows = [
        (name, *(f"{spread([1e3 * value for value in step[name, count]])} ms" for count in (0, COUNT)))
        for name in SETTINGS
    ]
    times = [own / other for own, other in zip(step[COMPILED, COUNT], step[EAGER, COUNT], strict=True)]
    notes = (
        f"Euler a, {SIZE['width']}x{SIZE['height']}, CFG 7: (a request of {MORE_STEPS} steps - one of {STEPS}) / "
        f"{MORE_STEPS - STEPS}; {rounds} rounds (quartiles)",
        f"compiled / eager with {COUNT} LoRAs: {spread(times)}; faster steps are promised of a GPU only",
    )
    part = spread([own / other for own, other in zip(step[COMPILED, COUNT], step[COMPILED, 0], strict=True)])
    claim = Claim(f"compiled step with {COUNT} LoRAs / with 0", part.median, LORA_TIMES, detail=part.range)
    report.add(Table("CPU time of a step", ("", "0 LoRAs", f"{COUNT} LoRAs"), rows, notes), [claim])


def measure_switches(both: Both, report: Report, rounds: int) -> None:
    """Another strength: what a request takes more, and what is compiled meanwhile."""
    cases = both.switch_cases()
    take_turns(list(cases.values()), rounds, both)
    extra = {
        name: [
            one.busy - other.busy
            for one, other in zip(cases[name, "switched"].samples, cases[name, "same again"].samples, strict=True)
        ]
        for name in SETTINGS
    }
    rows = [
        (
            name,
            *(seconds(cases[name, action].busy) for action in ("same again", "switched")),
            seconds(statistics.median(extra[name])),
        )
        for name in SETTINGS
    ]
    part = spread([own / statistics.median(extra[EAGER]) for own in extra[COMPILED]])
    claims = [
        Claim("switch under compilation / in eager", part.median, SWITCH_TIMES, detail=part.range),
        Claim("recompiles", compiled(both.benches[COMPILED])["recompiles"], 0),
    ]
    notes = (f"one of {COUNT} strengths changed; {STEPS} steps; includes the text's encoding; {rounds} rounds",)
    report.add(Table("CPU time of a switch", ("", "same again", "switched", "more"), rows, notes), claims)


if __name__ == "__main__":
    sys.exit(main())
