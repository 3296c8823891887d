"""A training as a job of the page: what it would do, how it goes, what is wished of it, and what came of it."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lib_lora.core.checkpoint import model_keymap
from lib_lora.core.files import map_checkpoint
from lib_lora.core.saving import DiskSpace, check_output, no_progress, output_path, save_bytes, save_with_metadata
from lib_lora.errors import JobError, OutputError, PrefuseError
from lib_lora.hosts.standalone.libraries import install_command, missing_to_train
from lib_lora.train.control import Wish
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.options import TrainOptions
from lib_lora.train.room import room_needed

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import Host
    from lib_lora.train.data.dataset import Dataset
    from lib_lora.train.data.report import DataReport
    from lib_lora.train.outcome import TrainOutcome
    from lib_lora.train.progress import TrainProgress
    from lib_lora.train.samples import Draw, SamplePrompt
    from lib_lora.ui.train_form import Plan


class Sample(NamedTuple):
    """A picture that was drawn on the way.

    Attributes:
        image: The pixels.
        step: Steps that were done.
        prompt: What it was drawn from.
    """

    image: Image
    step: int
    prompt: str


class Preview(NamedTuple):
    """What a training would do.

    Attributes:
        plan: That was asked for.
        report: What the picture folder has.
        steps: Of the optimizer.
        epochs: In which each picture is used as often as its folder says.
        disk: Room for the results; nothing is needed where the model's files do not tell.
    """

    plan: Plan
    report: DataReport
    steps: int
    epochs: float
    disk: DiskSpace


class Made(NamedTuple):
    """What a training made.

    Attributes:
        outcome: What it did.
        path: The file among the LoRAs.
        name: How a tag names it; ``""`` if none can.
    """

    outcome: TrainOutcome
    path: Path
    name: str


@dataclass
class Watch:
    """How one training goes. It is written by the job's thread, and read by those that answer the page.

    Attributes:
        phase: What is done before the first step.
        now: After the last step.
        first: Number of the first step, which is another than 1 if an earlier training goes on.
        losses: Of all steps since.
        samples: What was drawn on the way.
        wish: Of the page.
    """

    phase: str = ""
    now: TrainProgress | None = None
    first: int = 1
    losses: list[float] = field(default_factory=list[float])
    samples: list[Sample] = field(default_factory=list[Sample])
    wish: Wish = Wish.GO
    _progress: Progress = no_progress

    def begin(self, progress: Progress) -> None:
        """From now on tell the job how far it is; what `progress` raises ends the training."""
        self._progress = progress

    def bar(self, title: str) -> Progress:
        """Something is done before the first step."""
        self.phase = title
        return self._progress

    def listen(self, now: TrainProgress) -> None:
        """A step was done."""
        if not self.losses:
            self.first = now.step
        self.now = now
        self.losses.append(now.loss)
        self._progress(now.step - self.first + 1, now.steps - self.first + 1)

    def asked(self) -> Wish:
        """What is wished; a job that is cancelled ends here while it waits."""
        if self.now is not None:
            self._progress(self.now.step - self.first + 1, self.now.steps - self.first + 1)
        return self.wish

    def toggle_pause(self) -> None:
        """Wait after this step, or go on."""
        if self.wish is not Wish.STOP:
            self.wish = Wish.GO if self.wish is Wish.PAUSE else Wish.PAUSE

    def stop(self) -> None:
        """End after this step, and save."""
        self.wish = Wish.STOP

    def keeping(self, draw: Draw) -> Draw:
        """The same, whose pictures are kept for the page."""

        def keep(prompt: SamplePrompt, sampler: str) -> Image:
            image = draw(prompt, sampler)
            if self.now is not None:  # regularisation pictures are drawn before the first step
                self.samples.append(Sample(image, self.now.step, prompt.prompt))
            return image

        return keep


def preview(plan: Plan, progress: Progress) -> Preview:
    """Read the pictures, and count.

    Raises:
        PrefuseError: If they can not be trained on.
    """
    options = plan.options
    report = (dataset := open_dataset(options.data, progress)).report
    accumulated, epochs = options.optimizer.gradient_accumulation_steps, options.run.max_train_epochs
    batches = dataset.order().batches_per_epoch
    steps = options.run.max_train_steps if epochs is None else math.ceil(epochs * batches / accumulated)
    return Preview(plan, report, steps, steps * accumulated / batches, _disk(plan, dataset, steps))


def _disk(plan: Plan, dataset: Dataset, steps: int) -> DiskSpace:
    there = next(folder for folder in (plan.folder, *plan.folder.parents) if folder.is_dir())
    needed = 0
    with suppress(PrefuseError):  # a pickle does not tell its layers
        needed = room_needed(dataset, model_keymap(plan.model), plan.options, steps)
    return DiskSpace(needed, shutil.disk_usage(there).free)


def train_plan(host: Host, plan: Plan, watch: Watch, progress: Progress, *, replace: bool, resume: bool) -> Made:
    """Train, and put the result among the LoRAs.

    Args:
        host: Whose LoRAs these are.
        plan: What is done.
        watch: Told how it goes.
        progress: Told the steps; what it raises ends the training, and states that were saved are kept.
        replace: Whether an older LoRA of this name is replaced.
        resume: Go on from the newest state of this name.

    Raises:
        PrefuseError: If a library is missing; whatever the trainer raises.
    """
    watch.begin(progress)
    overwrite = replace or resume
    for path in (output_path(plan.folder, plan.name), plan.target):
        _made(path.parent)
        check_output(path, overwrite=overwrite)
    outcome = _train(host, _options(plan, replace=replace, resume=resume), watch)
    source = outcome.paths[0]
    save_with_metadata(source, plan.target, map_checkpoint(source).header.metadata, overwrite=overwrite)
    host.catalog.refresh()
    return Made(outcome, plan.target, host.catalog.tag_name(plan.target))


def _options(plan: Plan, *, replace: bool, resume: bool) -> TrainOptions:
    """Those of the trainer, once the files are there that they name."""
    if plan.prompts:
        save_bytes(plan.prompt_file, plan.prompts.encode(), overwrite=True)
    save_bytes(plan.configuration, plan.toml().encode(), overwrite=True)
    course = {"resume": plan.states} if resume else {}
    return TrainOptions.of({**plan.settings, "force": replace, **course})


def _train(host: Host, options: TrainOptions, watch: Watch) -> Any:
    """With our own pipelines, whatever draws the host's pictures."""
    if missing := missing_to_train():
        command = install_command(missing)
        raise JobError(f"not installed here and needed to train: {', '.join(missing)}; install with: {command}")
    from lib_lora.hosts.standalone.training import load_model, model_to_train, picture_drawer
    from lib_lora.train.trainer import train

    watch.bar("waiting for the GPU")
    with host.without_model():
        watch.bar("loading the model")
        loaded = load_model(options.model)
        draw = watch.keeping(picture_drawer(loaded, host.catalog.folders))
        model = model_to_train(loaded, options.model)
        return train(model, options, progress=watch.listen, wishes=watch.asked, draw_picture=draw, bars=watch.bar)


def _made(folder: Path) -> None:
    """Raises: OutputError: If there is no such folder and none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} can not be made: {error.strerror or error}") from error
