"""How soon the page is there with 2,000 LoRA files in the folder, and how soon a curve follows its slider.

The page runs stand-alone on newest gradio, in a headless Chromium on the same computer. Each file has a trainer's
alias in its metadata and no layers; the index of an earlier start is there, as it is from the second start on.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common import Claim, Report, Table, parse_options
from benchmarks.timing import spread
from lib_lora.core.saving import save_tensors
from tests.browser import MISSING, Browser, find_browser
from tests.ui.driver import PageDriver
from tests.ui.serving import PageServer, fill_loras

if TYPE_CHECKING:
    from collections.abc import Sequence

FILES, FEW = 2_000, 20
OPENINGS, MOVES = 9, 40
MOST_OPENING, MOST_REDRAWING = 2.0, 0.15
USABLE = "window.prefuseTab && !!document.querySelector('#prefuse-generate-start')?.offsetParent"
KNOBS = "document.querySelectorAll('.prefuse-block input[type=range]')"
CURVE = "#prefuse-blocks-curve svg"
REDRAWING = """new Promise((resolve) => {
    const drawn = () => document.querySelector("#prefuse-blocks-curve svg").outerHTML;
    const knob = document.querySelectorAll(".prefuse-block input[type=range]")[NUMBER];
    const before = drawn();
    const start = performance.now();
    const look = () => {
        if (drawn() !== before) requestAnimationFrame(() => resolve((performance.now() - start) / 1000));
        else if (performance.now() - start > 5000) resolve(5);
        else requestAnimationFrame(look);
    };
    knob.value = VALUE;
    knob.dispatchEvent(new Event("input", {bubbles: true}));
    look();
})"""


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("page", __doc__.splitlines()[0], argv, ("fp32",))
    executable = find_browser()
    if executable is None:
        print(MISSING)
        return 1
    report = Report("page", options, "fp32", file=options.stem)
    count = FEW if options.out is None else FILES
    with tempfile.TemporaryDirectory(prefix="prefuse-bench-") as name:
        server = PageServer(Path(name))
        fill_loras(server.loras)
        _write_files(server.loras, count)
        browser = Browser(executable, Path(name) / "browser")
        try:
            first, later = _openings(server, browser, options.rounds(OPENINGS))
            moves = _moves(PageDriver(browser, server.address), options.rounds(MOVES))
        finally:
            browser.close()
            server.end()
    _tell(report, count, {"first, after a start": first, "later": later}, moves)
    report.save()
    return 0


def _write_files(folder: Path, count: int) -> None:
    for number in range(count):
        tensors = {"lora_unet_x.alpha": torch.tensor(1.0)}
        save_tensors(folder / f"style number {number:04}.safetensors", tensors, {"ss_output_name": f"alias {number}"})


def _openings(server: PageServer, browser: Browser, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds from the address to a sub-tab that can be used: the first of each start, and the next one."""
    first: list[float] = []
    later: list[float] = []
    server.start()
    _opening(browser, server.address)  # fills the index
    for _ in range(rounds):
        server.end()
        server.start()
        first.append(_opening(browser, server.address))
        later.append(_opening(browser, server.address))
    return first, later


def _opening(browser: Browser, address: str) -> float:
    browser.open(address)
    browser.wait(f"location.href.startsWith('{address}') && {USABLE}", 60)
    return browser.run("performance.now()") / 1000


def _moves(page: PageDriver, rounds: int) -> list[float]:
    """Seconds from a slider's move to the curve that shows it."""
    page.open()
    page.sub_tab("Block weights")
    page.choose("blocks.lora", "stripes")
    page.wait(f"{KNOBS}.length > 12 && document.querySelector('{CURVE}')")
    knobs = page.run(f"{KNOBS}.length")
    moves = [(number % knobs, 0.25 + 0.25 * (number % 3)) for number in range(rounds + 1)]
    times = [page.run(REDRAWING.replace("NUMBER", str(knob)).replace("VALUE", f"'{value}'")) for knob, value in moves]
    return times[1:]


def _tell(report: Report, count: int, openings: dict[str, list[float]], moves: list[float]) -> None:
    rows = [(f"opening, {name}", f"{spread(times)} s", f"{max(times):.2f} s") for name, times in openings.items()]
    rows.append(("slider to redrawn curve", f"{spread([1e3 * one for one in moves])} ms", f"{1e3 * max(moves):.0f} ms"))
    claims = [
        Claim(f"opening, {name}: seconds", spread(times).median, MOST_OPENING, detail=spread(times).range)
        for name, times in openings.items()
    ]
    claims.append(
        Claim("slider to redrawn curve: seconds", spread(moves).median, MOST_REDRAWING, detail=spread(moves).range)
    )
    repeats = f"{len(openings['later'])} openings of each kind, {len(moves)} moves"
    notes = (
        f"medians and quartiles; {count:,} LoRA files; {repeats}",
        "opening: from the address to the first sub-tab with its scripts, in the browser's own clock",
    )
    report.add(Table("The page", ("what", "time", "longest"), rows, notes), claims)


if __name__ == "__main__":
    sys.exit(main())
