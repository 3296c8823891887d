"""What a training leaves: files of what is learned, states to go on from, sample pictures, a log."""

from __future__ import annotations

import logging
import secrets
import time
import zlib
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.locking import editing
from lib_lora.core.memory import OUT_OF_MEMORY, return_memory
from lib_lora.core.opening import reason_of, shown
from lib_lora.core.saving import check_writable, output_path, remove_file
from lib_lora.errors import OutputError, PrefuseError, TrainError
from lib_lora.train.board import Board, summary_writer
from lib_lora.train.engine import is_finite
from lib_lora.train.metadata import Reached, TrainingFacts, model_hashes, tag_frequency
from lib_lora.train.option_values import plain
from lib_lora.train.outcome import TrainOutcome
from lib_lora.train.samples import draw_samples, read_prompts
from lib_lora.train.state import read_state, write_state

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from pathlib import Path

    from lib_lora.train.data.dataset import Dataset
    from lib_lora.train.model import TrainModel
    from lib_lora.train.options import TrainOptions
    from lib_lora.train.progress import TrainProgress
    from lib_lora.train.samples import Draw
    from lib_lora.train.settings import OutputOptions
    from lib_lora.train.trainer import Training

logger = logging.getLogger(__name__)

WAIT_SECONDS = 1.0
"""For other processes of the same training, which look at its folder as well."""


def check_results(options: TrainOptions) -> None:
    """Check before the work that its results can be written.

    Raises:
        JobError: If the prompts of samples can not be read, or TensorBoard is to be written for and not installed.
        OutputError: If the folder can not be written to, a result is there already, or another training makes it.
    """
    output = options.output
    stem = output_path(_made(output.output_dir), output.output_name, "")
    with _alone(_states_of(stem)):
        pass
    paths = [stem.with_name(f"{stem.name}.safetensors"), *([stem] if options.model.full else [])]
    taken = [path for path in paths if path.exists()]
    if taken and not output.force and not output.resume:
        raise OutputError(f"{shown(taken[0])} exists already; choose another output_name, or set force")
    if output.sample_prompts:
        read_prompts(output.sample_prompts)
    if output.logging_dir is not None:
        summary_writer()


def outdated_steps(step: int, output: OutputOptions) -> range:
    """Steps whose file is deleted: those before the last ones that are kept, as kohya counts them."""
    every, kept = output.save_every_n_steps, output.save_last_n_steps
    return range(every, step - kept, every) if every and kept else range(0)


def outdated_epochs(epoch: int, every: int | None, output: OutputOptions) -> range:
    """The same of epochs, of which so many are kept."""
    kept = output.save_last_n_epochs
    return range(every, epoch - every * kept + 1, every) if every and kept else range(0)


class Results:
    """Writes, in the main process alone, what is due after a step.

    Attributes:
        folder: Of all that is written.
    """

    def __init__(
        self, training: Training, model: TrainModel, dataset: Dataset, draw_picture: Draw | None, identity: str
    ) -> None:
        """Nothing is written yet.

        Args:
            training: That is to be done.
            model: What is trained, or is trained on.
            dataset: The pictures.
            draw_picture: Draws samples.
            identity: What tells the model from others.
        """
        self._training, self._dataset, self._draw = training, dataset, draw_picture
        self._options = output = training.options.output
        self.folder = output.output_dir
        self._stem = output_path(self.folder, output.output_name, "")
        self._prompts = read_prompts(output.sample_prompts) if output.sample_prompts else []
        self._facts = _facts(training, model, dataset)
        self._course = training.options.course() | {"model": identity, "pictures": _of_pictures(dataset)}
        self._state: Path | None = None
        self._first = 0
        self._board: Board | None = None
        self._samples: list[Path] = []
        self._notes = [*training.options.notes, *training.trainee.notes, *dataset.report.notes]

    def resume(self) -> int:
        """Load the state that the options name; the steps that it has done.

        Raises:
            TrainError: If there is none, it can not be read, or it is of another training.
        """
        if self._options.resume is None:
            return 0
        state = read_state(self._options.resume, plain(self._course))
        self._training.load(state)
        self._first = state.step
        return state.step

    @contextmanager
    def board(self) -> Generator[Callable[[TrainProgress], None]]:
        """What is told each step for TensorBoard, nothing without logging_dir; nobody else trains the same meanwhile.

        Raises:
            OutputError: If its log can not be written, or another training writes the same files.
        """
        if not self._training.accelerator.is_main_process:
            yield lambda _: None
            return
        with _alone(_states_of(self._stem)), self._log() as log:
            yield log

    @contextmanager
    def _log(self) -> Generator[Callable[[TrainProgress], None]]:
        if self._options.logging_dir is None:
            yield lambda _: None
            return
        self._board = Board(self._options.logging_dir / self._options.output_name, self._first)
        try:
            yield self._board.add
        finally:
            self._board.close()

    def before_first(self) -> None:
        """Draw what is wanted before anything is learned."""
        if self._options.sample_at_first:
            self._draw_samples(0)

    def after_step(self, step: int) -> None:
        """Draw and write what is due.

        Raises:
            TrainError: If what was learned is not finite.
            OutputError: If something can not be written.
        """
        output, epoch = self._options, self._training.epoch(step)
        ended = self._training.epoch(step + 1) > epoch and step < self._training.steps
        if _due(step, output.sample_every_n_steps) or (ended and _due(epoch, output.sample_every_n_epochs)):
            self._draw_samples(step)
        if step == self._training.steps:
            return
        if _due(step, output.save_every_n_steps):
            self._save(self._of_step(step), step)
            self._remove(self._of_step(one) for one in outdated_steps(step, output))
        if ended and _due(epoch, self._every_epochs()):
            self._save(self._of_epoch(epoch), step)
            self._remove(self._of_epoch(one) for one in outdated_epochs(epoch, self._every_epochs(), output))
        if _due(step, output.save_state_every_n_steps):
            self.save_state(step)

    def save_state(self, step: int) -> None:
        """Write all that is needed to go on.

        Raises:
            TrainError: If what was learned is not finite.
            OutputError: If it can not be written.
        """
        if self._training.accelerator.is_main_process:
            self._check(step)
            state = self._training.state(step, plain(self._course))
            self._state = write_state(_made(_states_of(self._stem)), state, self._options.save_last_n_states)
        self._training.accelerator.wait_for_everyone()

    def outcome(self, step: int, loss: float, seconds: float, *, stopped: bool) -> TrainOutcome:
        """Write what is learned, and if the training was ended before its time, what is needed to go on.

        Raises:
            TrainError: If what was learned is not finite.
            OutputError: If it can not be written.
        """
        if (stopped and step < self._training.steps) or self._options.save_state_on_train_end:
            self.save_state(step)
        paths = self._save(self._stem, step)
        return TrainOutcome(
            paths,
            step,
            self._training.steps,
            loss,
            seconds,
            stopped,
            self._state,
            tuple(self._samples),
            len(self._dataset.report.skipped),
            tuple(self._notes),
        )

    def _of_step(self, step: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}-step{step:08d}")

    def _of_epoch(self, epoch: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{epoch:06d}")

    def _every_epochs(self) -> int | None:
        """After how many epochs is saved."""
        ratio = self._options.save_n_epoch_ratio
        return self._options.save_every_n_epochs if ratio is None else max(1, self._facts.epochs // ratio)

    def _remove(self, stems: Iterable[Path]) -> None:
        """Delete what was saved before, of a network; models are kept."""
        if self._training.accelerator.is_main_process and not self._training.options.model.full:
            for path in (path for stem in stems for path in self._training.trainee.paths(stem)):
                remove_file(path)

    def _save(self, stem: Path, step: int) -> tuple[Path, ...]:
        paths = self._training.trainee.paths(stem)
        if self._training.accelerator.is_main_process:
            self._check(step)
            reached = Reached(step, self._training.epoch(step), time.time())
            with self._training.averaged():
                self._training.trainee.save(stem, self._facts, reached)
        self._training.accelerator.wait_for_everyone()
        return paths

    def _check(self, step: int) -> None:
        if not is_finite(self._training.trainee.module.state_dict().values()):
            raise TrainError(f"what was learned in {step} steps holds NaN or infinity; lower the learning rate")

    @torch.no_grad()
    def _draw_samples(self, step: int) -> None:
        """Draw with what is learned; a picture that fails does not end the training."""
        accelerator, module = self._training.accelerator, self._training.trainee.module
        if accelerator.is_main_process and self._draw is not None:
            module.eval()
            try:
                with self._training.averaged(), accelerator.autocast():
                    name = f"{self._stem.name}_{step:08d}"
                    folder = _made(self.folder / "sample")
                    paths = draw_samples(self._draw, self._prompts, self._options.sample_sampler, folder, name)
                self._samples += paths
                if self._board:
                    self._board.add_samples(step, paths)
            except PrefuseError as error:
                logger.warning("no sample picture after step %d: %s", step, error)
            except OUT_OF_MEMORY:
                logger.warning("no sample picture after step %d: memory ran out; give them smaller --w and --h", step)
                return_memory()
            finally:
                module.train()
        accelerator.wait_for_everyone()


def _due(count: int, every: int | None) -> bool:
    return bool(every) and count % every == 0  # pyright: ignore[reportOperatorIssue]


def _states_of(stem: Path) -> Path:
    """The folder of states of a training with such results."""
    return stem.with_name(f"{stem.name}-state")


@contextmanager
def _alone(states: Path) -> Generator[None]:
    """No other training of that name writes into the same folder meanwhile.

    Raises:
        OutputError: If one does.
    """
    try:
        with editing(_made(states), "another training writes into", WAIT_SECONDS):
            yield
    finally:
        with suppress(OSError):  # states are in it
            states.rmdir()


def _made(folder: Path) -> Path:
    """A folder that can be written to.

    Raises:
        OutputError: If it can not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {shown(folder)} can not be made: {reason_of(error)}") from error
    check_writable(folder)
    return folder


def _of_pictures(dataset: Dataset) -> list[Any]:
    """What tells a training set from others: names, sizes in pixels, repeats, captions, strengths, options."""
    facts = (
        (one.name, one.size, one.repeats, one.caption, one.network_multiplier, *dataset.own_options(one).items())
        for one in dataset.pictures
    )
    text = "\n".join(" ".join(map(str, fact)) for fact in facts)
    return [len(dataset.pictures), zlib.crc32(text.encode())]


def _facts(training: Training, model: TrainModel, dataset: Dataset) -> TrainingFacts:
    options, batch = training.options, training.options.data.train_batch_size
    values = options.values()
    processes, accumulated = training.accelerator.num_processes, values["gradient_accumulation_steps"]
    kind, given = type(training.optimizer), ",".join(values["optimizer_args"])
    said = values["v_parameterization"]
    return TrainingFacts(
        options=values,
        data=dataset.report,
        tags=tag_frequency(dataset.folders, options.data.caption_separator),
        model_name=model.path.name,
        model_hashes=model_hashes(model.path),
        prediction=model.prediction if said is None else "v" if said else "epsilon",
        optimizer=f"{kind.__module__}.{kind.__name__}{f'({given})' if given else ''}",
        batches_per_epoch=training.batches_per_epoch,
        total_batch_size=batch * processes * accumulated,
        epochs=training.epoch(training.steps),
        steps=training.steps,
        session_id=secrets.randbelow(2**32),
        started_at=time.time(),
    )
