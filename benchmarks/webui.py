"""CPU seconds of a real WebUI when LoRAs enter, change and leave a prompt, and of a step, beside its built-in code.

Both sides answer the same requests in the same process, in turns; the extension's setting switches between them.
Needs a WebUI v1.10.1: its folder in ``WEBUI_ROOT``, its interpreter in ``WEBUI_PYTHON``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common import RESULTS, Claim, Options, Report, Table, seconds
from benchmarks.timing import Case, Sample, spread, take_turns
from tests.webui_real.make_models import GOOD, make_models
from tests.webui_real.server import WebUI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TEXT = "a photo of a red house"
SIZE = {"width": 64, "height": 64}
COUNTS = (1, 2, 5)
STEPS, MORE_STEPS = 2, 22
CHANNELS = 64
THIRD = 1 / 3
NOISE = 1.05
"""Step times that differ by less are the same."""
PACKAGES = ("torch", "gradio", "fastapi", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Side:
    """One way to apply LoRAs.

    Attributes:
        name: What the tables call it.
        settings: Of the WebUI.
        forget: Whether everything that was made for the model is thrown away before LoRAs are added.
    """

    name: str
    settings: dict[str, object]
    forget: bool = False


BUILTIN = Side("built-in", {"prefuse_enabled": False, "lora_in_memory_limit": 0})
KEPT = Side("built-in, lora_in_memory_limit = 10", {"prefuse_enabled": False, "lora_in_memory_limit": 10})
OURS = Side("ours", {"prefuse_enabled": True, "prefuse_cache_mb": 1024})
ANEW = Side("ours, prefuse_cache_mb = 0", {"prefuse_enabled": True, "prefuse_cache_mb": 0})
FIRST = Side("ours, first LoRA of the model", {"prefuse_enabled": True, "prefuse_cache_mb": 1024}, forget=True)
SIDES = (BUILTIN, KEPT, OURS, ANEW, FIRST)
CHANGES = ("added", "one strength changed")
ACTIONS = (*CHANGES, "same again", "removed")


class Bench:
    """Requests to one WebUI, as cases that `take_turns` times."""

    def __init__(self, webui: WebUI, sides: Sequence[Side] = SIDES, actions: Sequence[str] = ACTIONS) -> None:
        self.webui = webui
        self.sides, self.actions = sides, actions
        self._fresh = itertools.count()

    def draw(self, prompt: str, steps: int = STEPS) -> None:
        """One picture."""
        self.webui.draw(prompt, steps=steps, **SIZE)

    def draw_other_text(self) -> None:
        """A picture without LoRAs whose text has not been encoded before."""
        self.draw(f"{TEXT} {next(self._fresh)}")

    def time(self, action: Callable[[], object]) -> Sample:
        """Wall time here, CPU time of the WebUI's process."""
        busy, wall = self._busy(), time.perf_counter()
        action()
        return Sample(time.perf_counter() - wall, self._busy() - busy)

    def _busy(self) -> float:
        """CPU time of all threads of the WebUI; Linux's clock of another process (``clock_getcpuclockid``)."""
        return time.clock_gettime((~self.webui.process.pid << 3) | 2)

    def prepare(self, side: Side, *prompts: str) -> None:
        """Take a side and draw what was drawn before."""
        self.webui.options(**side.settings)
        for prompt in prompts:
            self.draw(prompt)
        if side.forget:
            self.webui.post("/prefuse/v1/release")
            self.draw(TEXT)

    def cases(self) -> dict[tuple[str, int, str], Case]:
        """Side, number of LoRAs and action → what is timed."""
        kept = (case for case in self._cases() if case[1] == 0 or case[2] in self.actions)
        return {case[:3]: Case(" ".join(map(str, case[:3])), *case[3:]) for case in kept}

    def _cases(self) -> Iterator[tuple[str, int, str, Callable[[], object], Callable[[], object]]]:
        for side in self.sides:
            still = partial(self.prepare, side, TEXT, TEXT)
            yield side.name, 0, "same again", partial(self.draw, TEXT), still
            if side in (BUILTIN, OURS):
                yield side.name, 0, "other text", self.draw_other_text, still
            for count in COUNTS:
                prompt, changed = tagged(count), tagged(count, 0.45)
                before = partial(self.prepare, side, prompt, TEXT)
                there = partial(self.prepare, side, prompt, prompt)
                yield side.name, count, "added", partial(self.draw, prompt), before
                if side.forget:
                    continue
                yield side.name, count, "same again", partial(self.draw, prompt), there
                yield side.name, count, "one strength changed", partial(self.draw, changed), there
                yield side.name, count, "removed", partial(self.draw, TEXT), there

    def step_cases(self) -> dict[tuple[str, int, int], Case]:
        """Side, number of LoRAs and number of steps → what is timed."""
        cases = {}
        for side, count, steps in itertools.product((BUILTIN, OURS), (0, 5), (STEPS, MORE_STEPS)):
            prompt = tagged(count)
            before = partial(self.prepare, side, prompt)
            cases[side.name, count, steps] = Case(f"{side.name} {count}", partial(self.draw, prompt, steps), before)
        return cases


def tagged(count: int, last: float = 0.5) -> str:
    """The prompt with LoRAs, the last one's strength given."""
    names = GOOD[:count]
    return TEXT + "".join(f" <lora:{name}:{last if name == names[-1] else 0.3}>" for name in names)


def parser_of(module: str, description: str) -> argparse.ArgumentParser:
    """Options that each benchmark of the WebUI has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description.splitlines()[0])
    parser.add_argument("--channels", type=int, default=CHANNELS, help="width of the UNet's first level (SD1: 320)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, str]:
    """What was given, and the WebUI's interpreter; ends the program if there is no WebUI."""
    given = parser.parse_args(argv)
    if "WEBUI_ROOT" not in os.environ:
        parser.error("set WEBUI_ROOT to the folder of a WebUI v1.10.1, WEBUI_PYTHON to its interpreter")
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    return given, os.environ.get("WEBUI_PYTHON", sys.executable)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("webui", __doc__)
    parser.add_argument("--step-rounds", type=int, default=9)
    parser.add_argument("--brief", action="store_true", help="both sides' defaults alone, for wide models")
    given, python = parse(parser, argv)
    options = options_of("webui", given.channels, given.out)
    report = Report("webui", options, "fp32", versions=versions_of(python), file=_stem(given.channels))
    with tempfile.TemporaryDirectory(prefix="prefuse-bench-") as folder:
        make_models(Path(folder), channels=given.channels)
        webui = WebUI(Path(os.environ["WEBUI_ROOT"]), python, Path(folder))
        webui.link_extension()
        try:
            webui.start()
            webui.options(samples_save=False)
            bench = Bench(webui, *((BUILTIN, OURS), CHANGES) if given.brief else (SIDES, ACTIONS))
            measure_changes(bench, report, given.rounds)
            measure_steps(bench, report, given.step_rounds)
        finally:
            webui.stop()
    report.save()
    return 0


def measure_changes(bench: Bench, report: Report, rounds: int) -> None:
    """LoRAs that enter, change and leave."""
    cases = bench.cases()
    take_turns(list(cases.values()), rounds, bench)
    columns = ("LoRAs", "request", *(side.name for side in bench.sides))
    rows = []
    for count, action in [(0, "same again"), (0, "other text"), *itertools.product(COUNTS, bench.actions)]:
        cells = [cases.get((side.name, count, action)) for side in bench.sides]
        rows.append((str(count), action, *("" if case is None else seconds(case.busy) for case in cells)))
    notes = (
        f"{STEPS} steps of Euler a, {SIZE['width']}x{SIZE['height']}, CFG 7; medians of {rounds} rounds",
        "added: to a prompt without LoRAs; the same LoRAs were in use before and were removed",
        "lora_in_memory_limit is 0 by default, prefuse_cache_mb is 1024; with 0, both read the files again",
    )
    report.add(Table("CPU time of a whole request", columns, rows, notes))
    report.add(_extra_table(cases, bench), [*_extra_claims(cases)])


def _extra(cases: dict[tuple[str, int, str], Case], side: Side, count: int, action: str) -> list[float]:
    """CPU seconds more than a request of the same side that changes nothing, round by round."""
    still = cases[side.name, 0, "same again"].samples
    return [one.busy - other.busy for one, other in zip(cases[side.name, count, action].samples, still, strict=True)]


def _extra_table(cases: dict[tuple[str, int, str], Case], bench: Bench) -> Table:
    rows = []
    for count, action in itertools.product(COUNTS, (action for action in bench.actions if action != "same again")):
        sides = [side for side in bench.sides if (side.name, count, action) in cases]
        median = {side.name: statistics.median(_extra(cases, side, count, action)) for side in sides}
        times = median[BUILTIN.name] / median[OURS.name]
        cells = (seconds(median[side.name]) if side in sides else "" for side in bench.sides)
        rows.append((str(count), action, *cells, f"{times:.1f}"))
    columns = ("LoRAs", "request", *(side.name for side in bench.sides), "ours is faster by")
    notes = ("more than a request without LoRAs that changes nothing; includes the text's encoding",)
    return Table("Extra CPU time", columns, rows, notes)


def _extra_claims(cases: dict[tuple[str, int, str], Case]) -> Iterator[Claim]:
    for action, count in itertools.product(("added", "one strength changed"), COUNTS):
        ours, theirs = (_extra(cases, side, count, action) for side in (OURS, BUILTIN))
        part = spread([own / statistics.median(theirs) for own in ours])
        yield Claim(f"{count} LoRAs, {action}: extra CPU / built-in's", part.median, THIRD, detail=part.range)
    for count in COUNTS if (ANEW.name, 1, "added") in cases else ():
        ours, theirs = _extra(cases, ANEW, count, "added"), _extra(cases, BUILTIN, count, "added")
        part = spread([own / statistics.median(theirs) for own in ours])
        yield Claim(
            f"{count} LoRAs, added, files read again: extra CPU / built-in's", part.median, THIRD, detail=part.range
        )


def measure_steps(bench: Bench, report: Report, rounds: int) -> None:
    """A step with none and with five."""
    cases = bench.step_cases()
    take_turns(list(cases.values()), rounds, bench)
    step = {}
    for side, count in itertools.product((BUILTIN.name, OURS.name), (0, 5)):
        pairs = zip(cases[side, count, MORE_STEPS].samples, cases[side, count, STEPS].samples, strict=True)
        step[side, count] = [(more.busy - less.busy) / (MORE_STEPS - STEPS) for more, less in pairs]
    rows = [
        (side, *(f"{spread([1e3 * value for value in step[side, count]])} ms" for count in (0, 5)))
        for side in (BUILTIN.name, OURS.name)
    ]
    columns = ("", "0 LoRAs", "5 LoRAs")
    notes = (f"(a request of {MORE_STEPS} steps - one of {STEPS}) / {MORE_STEPS - STEPS}; {rounds} rounds (quartiles)",)
    report.add(Table("CPU time of a step", columns, rows, notes), [*_step_claims(step)])


def _step_claims(step: dict[tuple[str, int], list[float]]) -> Iterator[Claim]:
    names = {"step with 5 / with 0": (OURS.name, 0), "step with 5 / built-in's with 5": (BUILTIN.name, 5)}
    for name, key in names.items():
        part = spread([own / other for own, other in zip(step[OURS.name, 5], step[key], strict=True)])
        yield Claim(name, part.median, NOISE, detail=part.range)


def _stem(channels: int) -> str:
    return "webui" if channels == CHANNELS else f"webui-{channels}"


def options_of(suite: str, channels: int, out: Path) -> Options:
    """What is measured with models of so many channels."""
    shape = f"SD1's structure at {channels} channels"
    typed = " ".join([f"python -m benchmarks.{suite}", *sys.argv[1:]])
    return Options(torch.device("cpu"), ("fp32",), (), shape, 1.0, out, suite, typed)


def versions_of(python: str) -> dict[str, str]:
    """Of the WebUI and the packages of its interpreter."""
    code = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps({{'python': platform.python_version()}} | {{n: version(n) for n in {PACKAGES!r}}}))"
    )
    out = subprocess.run([python, "-c", code], capture_output=True, check=True, text=True).stdout  # noqa: S603 - its own
    return {"WebUI": "1.10.1"} | json.loads(out)


if __name__ == "__main__":
    sys.exit(main())
