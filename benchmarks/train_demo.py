"""What the embedded model learns in minutes: a line around shapes, which it can not draw; and a DyLoRA at each rank.

Both are trained on the CPU by the function behind the command `train`, from the committed configuration of the demo's
LoRA "outline" with fewer steps. Pictures are drawn from prompts that name no line. A picture is right if the line is
clearly visible and the colours are still those of its prompt.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import Claim, Report, Table, lora_folder, parse_options
from benchmarks.effects import CLEARLY_VISIBLE, drawn, has_colours, luminance, outline_darkness, wanted
from lib_lora import LoraSession
from lib_lora.hosts.standalone.demo import CONFIG_DIR
from lib_lora.hosts.standalone.demo.lora_pictures import LIST, PICTURES, write_pictures
from lib_lora.hosts.standalone.loading import load_pipeline
from lib_lora.hosts.standalone.training import model_to_train
from lib_lora.tools.dylora import split_dylora
from lib_lora.train.option_values import read_toml
from lib_lora.train.options import TrainOptions
from lib_lora.train.trainer import train

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NAME = "outline"
THREADS = 2
SCENES, STEPS, CFG, SEED = 80, 20, 4.0, 500
MINUTES = 5.0
LEAST_SUCCESS = 0.8
RANK, UNIT = 8, 1
FEWER = {"max_train_steps": 400}
DYLORA = {
    "output_name": "dylora",
    "network_module": "dylora",
    "network_dim": RANK,
    "network_alpha": RANK / 2,
    "conv_dim": RANK,
    "conv_alpha": RANK / 2,
    "unit": UNIT,
    "train_batch_size": 16,
    "max_train_steps": 800,
}


@dataclass(frozen=True)
class Seen:
    """What pictures show, beside those of the base model.

    Attributes:
        line: How much darker than in the base's picture the line is, luminance from 0 to 255; (N,).
        colours: Whether the colours are those of the prompt, (N,).
    """

    line: np.ndarray
    colours: np.ndarray

    @property
    def success(self) -> float:
        """Part of the pictures that are right."""
        return float(np.mean((self.line > CLEARLY_VISIBLE) & self.colours))

    def cells(self) -> tuple[str, str, str, str]:
        """For a table."""
        visible = np.mean(self.line > CLEARLY_VISIBLE)
        return f"{self.line.mean():.1f}", f"{visible:.3f}", f"{self.colours.mean():.3f}", f"{self.success:.3f}"


COLUMNS = ("line darker by, of 255", "visible", "colours right", "both")


class Model:
    """The embedded model with the LoRAs of a folder.

    Attributes:
        base: What it draws without one, (N, 64, 64, 3), 0 to 255.
    """

    def __init__(self, folder: Path, *, tiny: bool) -> None:
        self._pipe = load_pipeline("demo", "cpu", "fp32").pipe
        self._pipe.set_progress_bar_config(disable=True)
        self._session = LoraSession.for_pipeline(self._pipe, lora_dir=folder)
        self._scenes, self._steps = wanted(2 if tiny else SCENES), 2 if tiny else STEPS
        self.base = self._pictures()

    def pictures(self, name: str, strength: float = 1.0) -> np.ndarray:
        """What it draws with a LoRA; as `base`."""
        report = self._session.set([(name, strength)])
        if report.refused:
            raise RuntimeError(f"not applied: {report}")
        return self._pictures()

    def seen(self, pictures: np.ndarray) -> Seen:
        """What they show, and those of the base do not."""
        line = outline_darkness(luminance(pictures)) - outline_darkness(luminance(self.base))
        return Seen(line, np.array([has_colours(*pair) for pair in zip(pictures, self._scenes, strict=True)]))

    def _pictures(self) -> np.ndarray:
        return drawn(self._pipe, [scene.prompt for scene in self._scenes], self._steps, CFG, SEED)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 if a promise does not hold."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not any(word.startswith("--threads") for word in given):
        given.append(f"--threads={THREADS}")
    options = replace(parse_options("train_demo", __doc__.splitlines()[0], given, ("fp32",)), model="embedded")
    report = Report("train_demo", options, "fp32", file="train_demo-cpu-fp32")
    with lora_folder() as folder:
        measure(folder, report, tiny="--tiny" in given)
    report.save()
    return min(1, sum(not claim.met for claim in report.claims))


def measure(folder: Path, report: Report, *, tiny: bool) -> None:
    """A LoRA, then a DyLoRA, and what the model draws with them."""
    few = {"max_train_steps": 2, "train_batch_size": 2} if tiny else {}
    write_pictures(NAME, folder / "pictures", 8 if tiny else PICTURES)
    minutes = train_minutes(folder, few)
    report.add(*measure_lora(Model(folder, tiny=tiny), minutes))
    minutes = train_minutes(folder, DYLORA | few)
    whole = folder / f"{DYLORA['output_name']}.safetensors"
    split = split_dylora(whole, folder / "cut.safetensors", UNIT)
    names = {rank: path.stem for rank, path in zip(split.ranks, split.paths, strict=True)} | {RANK: whole.stem}
    report.add(measure_ranks(Model(folder, tiny=tiny), names, minutes))


def train_minutes(folder: Path, given: Mapping[str, Any]) -> float:
    """Train the embedded model into `folder`; the minutes, with all that is before the first step."""
    places = {"in_json": folder / "pictures" / LIST, "output_dir": folder}
    options = TrainOptions.of({**read_toml(CONFIG_DIR / f"{NAME}.toml"), **FEWER, **places, **given})
    loaded = load_pipeline("demo", "cpu", "fp32")
    start = time.perf_counter()
    train(model_to_train(loaded, options.model), options)
    return (time.perf_counter() - start) / 60


def measure_lora(model: Model, minutes: float) -> tuple[Table, list[Claim]]:
    """What the LoRA does at each strength."""
    made = {strength: model.pictures(NAME, strength) for strength in (0.0, 0.5, 1.0)}
    whole, changed = model.seen(made[1.0]), float(np.sum(made[0.0] != model.base))
    claims = [
        Claim("minutes of training", minutes, MINUTES),
        Claim("pictures that are right at strength 1", whole.success, LEAST_SUCCESS, at_most=False),
        Claim("numbers of the pictures at strength 0 that are not the base's", changed, 0.0),
    ]
    shown = {"no LoRA": model.base, **{f"LoRA at {strength:g}": pictures for strength, pictures in made.items()}}
    rows = [(name, *model.seen(pictures).cells()) for name, pictures in shown.items()]
    notes = (f"{len(model.base)} pictures; {minutes:.1f} minutes of training",)
    return Table("A line that the base can not draw", ("pictures of", *COLUMNS), rows, notes), claims


def measure_ranks(model: Model, names: Mapping[int, str], minutes: float) -> Table:
    """What each cut of a DyLoRA does, and which do less than the next smaller one."""
    found = {rank: model.seen(model.pictures(name)) for rank, name in names.items()}
    smaller = zip(found, list(found)[1:], strict=False)
    worse = [str(rank) for below, rank in smaller if found[rank].success < found[below].success]
    notes = (
        f"{len(model.base)} pictures at strength 1; {minutes:.1f} minutes of training, unit {UNIT}",
        f"less often right than the rank below: {', '.join(worse) or 'none'}",
    )
    rows = [(str(rank), *one.cells()) for rank, one in found.items()]
    return Table("A DyLoRA cut to its ranks", ("rank", *COLUMNS), rows, notes)


if __name__ == "__main__":
    sys.exit(main())
