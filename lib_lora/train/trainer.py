"""The training: from a model, pictures and options to a LoRA file, or to a tuned model."""

from __future__ import annotations

import math
import time
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lib_lora.core.saving import no_progress
from lib_lora.errors import JobError, TrainError
from lib_lora.train.averages import MovingAverage
from lib_lora.train.control import Wish, go
from lib_lora.train.data.class_pictures import missing_class_pictures
from lib_lora.train.data.dataset import open_dataset
from lib_lora.train.data.tensor_cache import weights_fingerprint
from lib_lora.train.encoders import Encoders
from lib_lora.train.engine import agreed, frozen_dtype, keep_fewer_activations, make_accelerator
from lib_lora.train.model import check_model
from lib_lora.train.noise import NoiseSchedule, draw, learned_noise, mixed_seed
from lib_lora.train.objective import Objective
from lib_lora.train.optimizers import make_optimizer
from lib_lora.train.progress import Meter, unheard
from lib_lora.train.results import Results, check_results
from lib_lora.train.samples import draw_class_pictures
from lib_lora.train.schedules import make_schedule
from lib_lora.train.state import State, pack_optimizer, unpack_optimizer
from lib_lora.train.trainees import make_trainee
from lib_lora.train.troubles import told

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

    from lib_lora.core.saving import Progress
    from lib_lora.train.control import Wishes
    from lib_lora.train.data.batch import Batch
    from lib_lora.train.data.dataset import Dataset
    from lib_lora.train.model import TrainModel
    from lib_lora.train.options import TrainOptions
    from lib_lora.train.outcome import TrainOutcome
    from lib_lora.train.progress import Listener
    from lib_lora.train.samples import Draw
    from lib_lora.train.trainees import Trainee

PAUSE_SECONDS = 0.2
"""Between two looks whether the training may go on."""
_CHANCE = 1
"""What is added to the seed for torch's own chance, so that it is not that of the noise."""


def silent(_: str) -> Progress:
    """Nobody wants to know how far it is."""
    return no_progress


def train(
    model: TrainModel,
    options: TrainOptions,
    *,
    progress: Listener = unheard,
    wishes: Wishes = go,
    draw_picture: Draw | None = None,
    bars: Callable[[str], Progress] = silent,
) -> TrainOutcome:
    """Train.

    Args:
        model: Its weights are cast to the type of `mixed_precision` and moved; with `full` they are trained.
        options: What is done.
        progress: Told after each step, in the main process; what it raises ends the training, and nothing is saved.
        wishes: Asked after each step whether to go on, to wait, or to end and save.
        draw_picture: Draws samples, and regularisation pictures that are missing; None for none.
        bars: What is done before the first step → who is told how far it is.

    Raises:
        JobError: If the options do not fit each other, the model or the pictures.
        TrainError: If the loss is not a number, memory runs out, another process is lost, or the state to go on from
            is of another training.
        FileError: If a picture, a network or a state can not be read.
        OutputError: If something can not be written. What was saved last is kept, whatever is raised.
    """
    check_model(model, options)
    check_results(options)
    accelerator = make_accelerator(options.run, options.optimizer.gradient_accumulation_steps)
    with told(options, "while the training was prepared or saved", accelerator.num_processes):
        _draw_class_pictures(accelerator, model, options, draw_picture, bars)
        dataset = open_dataset(options.data, bars("looking at pictures"))
        if options.model.full and dataset.is_multiplied:
            raise JobError("network_multiplier is a network's strength, and full trains none; leave it out of the list")
        identity = weights_fingerprint(model.unet.parameters())
        torch.manual_seed(options.data.seed)  # of the weights that a network begins with
        with _trainee(model, options) as trainee:
            training = Training(accelerator, model, options, dataset, trainee, bars)
            results = Results(training, model, dataset, draw_picture, identity)
            return _run(training, results, progress, wishes)


def _draw_class_pictures(
    accelerator: Any,
    model: TrainModel,
    options: TrainOptions,
    draw_picture: Draw | None,
    bars: Callable[[str], Progress],
) -> None:
    """With the model as it is, before anything is trained."""
    with accelerator.main_process_first():
        if missing := missing_class_pictures(options.data):
            model.unet.to(accelerator.device)
            with accelerator.autocast(), torch.no_grad():
                bar = bars("drawing regularisation pictures")
                draw_class_pictures(missing, draw_picture, options.data.size, bar)


@contextmanager
def _trainee(model: TrainModel, options: TrainOptions) -> Generator[Trainee]:
    """What is trained, taken off the model in the end."""
    trainee = make_trainee(model, options)
    try:
        yield trainee
    finally:
        trainee.release()
        keep_fewer_activations(model.unet, model.text_encoders, on=False)
        for part in (model.unet, *model.text_encoders):
            part.eval()


def _run(training: Training, results: Results, progress: Listener, wishes: Wishes) -> TrainOutcome:
    """All steps, with what is saved on the way and in the end."""
    first = results.resume()
    meter, start = Meter(training.steps, training.accelerator.device), time.perf_counter()
    step, wish = first, Wish.GO
    with closing(training.batches(first)) as batches, results.board() as board:
        if not first:
            results.before_first()
        while step < training.steps and wish is not Wish.STOP:
            loss = training.step(batches, step)
            step += 1
            now = meter.after_step(step, training.epoch(step), loss, training.rates())
            if training.accelerator.is_main_process:
                progress(now)
                board(now)
            results.after_step(step)
            wish = _wait(training, results, wishes, step)
    return results.outcome(step, meter.mean_loss, time.perf_counter() - start, stopped=wish is Wish.STOP)


def _wait(training: Training, results: Results, wishes: Wishes, step: int) -> Wish:
    """What is wanted; while that is a pause, the state is on the disk and time passes."""
    wish = agreed(training.accelerator, wishes())
    if wish is Wish.PAUSE:
        results.save_state(step)
    while wish is Wish.PAUSE:
        time.sleep(PAUSE_SECONDS)
        wish = agreed(training.accelerator, wishes())
    return wish


class Training:
    """Model, pictures and optimizer, put together.

    Attributes:
        accelerator: Of Accelerate.
        options: What is done.
        trainee: What is trained.
        steps: Of the optimizer, in all.
        batches_per_epoch: In all processes.
        average: Of what is trained, or None.
        optimizer: Of torch.
    """

    def __init__(
        self,
        accelerator: Any,
        model: TrainModel,
        options: TrainOptions,
        dataset: Dataset,
        trainee: Trainee,
        bars: Callable[[str], Progress],
    ) -> None:
        self.accelerator, self.options, self.trainee = accelerator, options, trainee
        self._encoders = Encoders(model, options, accelerator.device, trains_text=trainee.trains_text)
        _cast_frozen(model, trainee, frozen_dtype(options.run))
        self._loader = self._encoders.loader(dataset, accelerator, bars)
        self._objective = accelerator.prepare(self._new_objective(model))
        self._objective.train()
        groups = trainee.groups()
        self._parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        self.batches_per_epoch = self._loader.order.batches_per_epoch
        self.steps = self._planned_steps()
        self.optimizer = make_optimizer(groups, options.optimizer)
        self._schedule = make_schedule(self.optimizer, options.optimizer, self.steps)
        self._prepared = accelerator.prepare(self.optimizer)
        self.average = MovingAverage(self._parameters, options.optimizer.ema_decay) if options.optimizer.ema else None

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that the last batch of so many steps was of."""
        return max(0, step * self._accumulated - 1) // self.batches_per_epoch + 1

    def rates(self) -> dict[str, float]:
        """Group of parameters → learning rate."""
        return {group.get("name", str(index)): group["lr"] for index, group in enumerate(self.optimizer.param_groups)}

    def batches(self, first: int) -> Generator[Batch]:
        """Those of all steps from `first` on."""
        return self._loader.batches(first * self._accumulated, self.steps * self._accumulated)

    def step(self, batches: Iterator[Batch], step: int) -> float:
        """Move the parameters once; the mean loss of all processes.

        Args:
            batches: As many as make a step are taken.
            step: Steps that were done before.

        Raises:
            TrainError: If the loss is not a number, the parameters are as they were then; if memory runs out; or if
                another process is lost.
        """
        with told(self.options, f"in step {step + 1}", self.accelerator.num_processes):
            loss = self._gradients(batches)
            if not math.isfinite(loss):
                raise TrainError(
                    f"the loss of step {step + 1} is {loss} at the learning rates {self._shown_rates()}; "
                    "lower them, or choose mixed_precision bf16 or no"
                )
            self._move(step)
        return loss

    def state(self, step: int, course: dict[str, Any]) -> State:
        """All that is needed to go on."""
        tensors, numbers = pack_optimizer(self.optimizer)
        scaler = self.accelerator.scaler
        numbers |= {"schedule": self._schedule.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
        average = self.average.tensors() if self.average else {}
        return State(step, course, {**self.trainee.module.state_dict(), **average, **tensors}, numbers)

    def load(self, state: State) -> None:
        """Go on from a state."""
        names = self.trainee.module.state_dict()
        self.trainee.module.load_state_dict({name: state.tensors[name] for name in names})
        unpack_optimizer(self.optimizer, state.tensors, state.numbers)
        self._schedule.load_state_dict(dict(state.numbers["schedule"]))
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state.numbers["scaler"])
        if self.average:
            self.average.load(state.tensors)

    def averaged(self) -> Any:
        """Inside of it, what is trained is its average, if there is one."""
        return self.average.applied() if self.average else nullcontext()

    @property
    def _accumulated(self) -> int:
        return self.options.optimizer.gradient_accumulation_steps

    def _new_objective(self, model: TrainModel) -> Objective:
        options, data = self.options, self.options.data
        if options.run.gradient_checkpointing:
            keep_fewer_activations(model.unet, model.text_encoders if self.trainee.trains_text else ())
        schedule = NoiseSchedule.of_scheduler(
            model.scheduler,
            zero_terminal_snr=options.loss.zero_terminal_snr,
            v_prediction=options.model.v_parameterization,
        )
        return Objective(
            model.unet,
            () if data.caches_texts else model.text_encoders,
            self.trainee.network,
            schedule.to(self.accelerator.device),
            trains_text=self.trainee.trains_text,
            clip_skip=options.model.clip_skip,
            loss=options.loss,
        )

    def _planned_steps(self) -> int:
        epochs = self.options.run.max_train_epochs
        if epochs is None:
            return self.options.run.max_train_steps
        return math.ceil(epochs * self.batches_per_epoch / self._accumulated)

    def _gradients(self, batches: Iterator[Batch]) -> float:
        """Gradients of a step's batches; their mean loss."""
        losses: list[Tensor] = []
        for _ in range(self._accumulated):
            batch = next(batches).to(self.accelerator.device)
            # Dropouts draw from torch's chance: it is that of this batch, whatever was drawn before.
            torch.manual_seed(mixed_seed(self.options.data.seed + _CHANCE, batch.step))
            with self.accelerator.accumulate(self._objective), self._multiplied(batch):
                loss = self._loss(batch)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        return float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))

    def _multiplied(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside of it, the network has the strengths of the batch's pictures."""
        network = self.trainee.network
        return nullcontext() if network is None else network.multiplied(batch.network_multipliers)

    def _loss(self, batch: Batch) -> Tensor:
        options, device = self.options, self.accelerator.device
        moments = self._encoders.moments_of(batch)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        times = (options.loss.min_timestep, options.loss.max_timestep)
        drawn = draw(options.data.seed, batch.places, shape, times, options.noise).to(device)
        latents = self._encoders.sample(moments, drawn.encoding)
        noise = learned_noise(drawn, latents, options.noise)
        texts, weights, sizes = batch.texts, batch.weights, batch.time_ids
        return self._objective(latents, noise, drawn.times, texts, weights, sizes, drawn.unasked)

    def _move(self, step: int) -> None:
        if self.options.optimizer.max_grad_norm:
            self.accelerator.clip_grad_norm_(self._parameters, self.options.optimizer.max_grad_norm)
        self._prepared.step()
        self._schedule.step()
        self._prepared.zero_grad()
        self.trainee.after_step()
        if self.average:
            self.average.update(step + 1)

    def _shown_rates(self) -> str:
        return ", ".join(f"{rate:g} ({name})" for name, rate in self.rates().items())


def _cast_frozen(model: TrainModel, trainee: Trainee, dtype: torch.dtype) -> None:
    """What is not trained has the type of the products; what is trained stays float32."""
    for part in (model.unet, *model.text_encoders):
        if part is not trainee.module and part.dtype != dtype:
            nn.Module.to(part, dtype)  # diffusers' own warns of what these models have not
