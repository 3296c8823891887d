"""Learning rates over the steps, by name: of diffusers and of torch, and those of kohya's that are of neither.

Source: get_scheduler_fix of kohya's sd-scripts (library/train_util.py), transformers/optimization.py.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler

from lib_lora.errors import JobError
from lib_lora.train.optimizers import read_settings
from lib_lora.train.settings import LONGEST_WARM_UP

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from lib_lora.train.settings import OptimizerOptions

_OF_DIFFUSERS = (
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    "piecewise_constant",
)
_NO_USE = ("LRScheduler", "ReduceLROnPlateau", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")
"""They need more than numbers; the first is their base."""


def make_schedule(optimizer: Optimizer, options: OptimizerOptions, steps: int) -> Any:
    """The schedule of that name; to be stepped once for each step of the optimizer.

    Raises:
        JobError: If there is no such schedule, or it does not take the settings.
    """
    settings = read_settings(options.lr_scheduler_args, "lr_scheduler_args")
    name = options.lr_scheduler_type or options.lr_scheduler
    try:
        if options.lr_scheduler_type:
            return _kind(options.lr_scheduler_type)(optimizer, **settings)
        if name in _OWN:
            return lr_scheduler.LambdaLR(optimizer, _OWN[name](options, steps, **settings))
        return _of_diffusers(optimizer, options, steps, settings)
    except (TypeError, ValueError) as error:
        raise JobError(f"{name} refuses its settings: {error}; see lr_scheduler_args") from error


def _of_diffusers(optimizer: Optimizer, options: OptimizerOptions, steps: int, settings: dict[str, Any]) -> Any:
    from diffusers.optimization import get_scheduler

    if options.lr_scheduler not in _OF_DIFFUSERS:
        there = ", ".join((*_OF_DIFFUSERS, *_OWN))
        hint = "; Adafactor's own rate is relative_step=True in optimizer_args" if "ada" in options.lr_scheduler else ""
        raise JobError(f"there is no lr_scheduler {options.lr_scheduler!r}; there are {there}{hint}")
    if options.lr_scheduler == "piecewise_constant" and "step_rules" not in settings:
        raise JobError("piecewise_constant needs its rates: lr_scheduler_args step_rules='1:100,0.1:200,0.01'")
    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=_steps(options.lr_warmup_steps, steps),
        num_training_steps=steps,
        num_cycles=options.lr_scheduler_num_cycles,
        power=options.lr_scheduler_power,
        **settings,
    )


def _steps(given: float, steps: int) -> int:
    return round(given * steps) if given < LONGEST_WARM_UP else round(given)


def _kind(name: str) -> Any:
    """A class of torch, as kohya's dotted name or by itself."""
    found = {key: kind for key, kind in vars(lr_scheduler).items() if _is_schedule(key, kind)}
    kind = found.get(name.removeprefix("torch.optim.lr_scheduler."))
    if kind is None:
        close = get_close_matches(name, found, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise JobError(f"torch has no lr_scheduler_type {name!r}; {hint}it has {', '.join(sorted(found))}")
    return kind


def _is_schedule(name: str, kind: Any) -> bool:
    is_class = isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    return is_class and not name.startswith("_") and name not in _NO_USE


def _inverse_sqrt(options: OptimizerOptions, steps: int) -> Callable[[int], float]:
    warm = _steps(options.lr_warmup_steps, steps)
    scale = options.lr_scheduler_timescale or warm or 10_000

    def factor(step: int) -> float:
        return step / warm if step < warm else 1 / math.sqrt((step + scale - warm) / scale)

    return factor


def _cosine_with_min_lr(options: OptimizerOptions, steps: int) -> Callable[[int], float]:
    warm = _steps(options.lr_warmup_steps, steps)

    def factor(step: int) -> float:
        return step / warm if step < warm else _wave((step - warm) / max(1, steps - warm), options)

    return factor


def _warmup_stable_decay(options: OptimizerOptions, steps: int) -> Callable[[int], float]:
    warm, decay = _steps(options.lr_warmup_steps, steps), _steps(options.lr_decay_steps, steps)
    least = options.lr_scheduler_min_lr_ratio or 0.0

    def factor(step: int) -> float:
        if step < warm:
            return step / warm * (1 - least) + least
        if step < steps - decay:
            return 1.0
        return _wave((step - steps + decay) / decay, options) if step < steps else least

    return factor


def _wave(progress: float, options: OptimizerOptions) -> float:
    """From 1 down to the least rate, in half waves."""
    least = options.lr_scheduler_min_lr_ratio or 0.0
    return (1 + math.cos(math.pi * options.lr_scheduler_num_cycles * progress)) / 2 * (1 - least) + least


_OWN: dict[str, Callable[..., Callable[[int], float]]] = {
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
}
