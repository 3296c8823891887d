"""Learning rates over the steps are those of transformers, diffusers and torch."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import optimization as theirs

from lib_lora.errors import JobError
from lib_lora.train.schedules import make_schedule
from lib_lora.train.settings import OptimizerOptions

pytestmark = pytest.mark.newest

STEPS = 60


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(schedule, steps: int = STEPS + 5) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def ours(name: str = "constant", **options) -> list[float]:
    return rates(make_schedule(optimizer(), OptimizerOptions(lr_scheduler=name, **options), STEPS))


@pytest.mark.parametrize(("warm", "scale"), [(0, None), (10, None), (10, 25)])
def test_an_inverse_root_is_that_of_transformers(warm, scale):
    expected = rates(theirs.get_inverse_sqrt_schedule(optimizer(), warm, timescale=scale))
    assert ours("inverse_sqrt", lr_warmup_steps=warm, lr_scheduler_timescale=scale) == pytest.approx(expected)


@pytest.mark.parametrize("cycles", [1, 3])
@pytest.mark.parametrize("least", [0.0, 0.2])
def test_a_cosine_with_a_least_rate_is_that_of_transformers_as_kohya_calls_it(cycles, least):
    expected = rates(
        theirs.get_cosine_with_min_lr_schedule_with_warmup(optimizer(), 6, STEPS, cycles / 2, min_lr_rate=least), STEPS
    )
    options = {"lr_warmup_steps": 0.1, "lr_scheduler_num_cycles": cycles, "lr_scheduler_min_lr_ratio": least}
    assert ours("cosine_with_min_lr", **options)[:STEPS] == pytest.approx(expected)


@pytest.mark.parametrize("least", [None, 0.1])
def test_a_plateau_with_a_fall_is_that_of_transformers_as_kohya_calls_it(least):
    made = theirs.get_wsd_schedule(
        optimizer(), 6, 15, num_stable_steps=STEPS - 21, min_lr_ratio=least or 0.0, num_cycles=0.5
    )
    options = {"lr_warmup_steps": 6, "lr_decay_steps": 0.25, "lr_scheduler_min_lr_ratio": least}
    assert ours("warmup_stable_decay", **options) == pytest.approx(rates(made))


def test_rates_in_pieces_are_those_that_are_given():
    found = ours("piecewise_constant", lr_scheduler_args=["step_rules='1:10,0.1:20,0.01'"])
    assert found[9:21:5] == [1.0, 0.1, 0.1]
    assert found[20] == 0.01


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "torch.optim.lr_scheduler.CosineAnnealingLR"])
def test_a_class_of_torch_is_taken_with_its_settings(name):
    expected = rates(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer(), T_max=30, eta_min=0.1))
    assert ours(lr_scheduler_type=name, lr_scheduler_args=["T_max=30", "eta_min=0.1"]) == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr_scheduler": "cosin"}, "no lr_scheduler 'cosin'; there are constant, .*warmup_stable_decay"),
        ({"lr_scheduler": "adafactor:1e-3"}, "relative_step=True"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules='1:100,0.1:200,0.01'"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("last_epoch",)}, "lr_scheduler_args: 'last_epoch' is not"),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": ("x=1",)}, "cosine_with_min_lr refuses"),
        ({"lr_scheduler_type": "CosineAnealingLR"}, "did you mean CosineAnnealingLR"),
        ({"lr_scheduler_type": "os.system"}, "torch has no lr_scheduler_type 'os.system'"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "torch has no lr_scheduler_type"),
        ({"lr_scheduler_type": "CosineAnnealingLR"}, "CosineAnnealingLR refuses its settings: .*T_max"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=0", "x=1")}, "StepLR refuses its settings"),
    ],
)
def test_a_schedule_that_there_is_not_is_one_sentence(options, sentence):
    with pytest.raises(JobError, match=sentence):
        make_schedule(optimizer(), OptimizerOptions(**options), STEPS)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 5},
        {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 20},
        {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1.0", f"total_steps={STEPS}")},
        {"lr_scheduler_type": "CosineAnnealingWarmRestarts", "lr_scheduler_args": ("T_0=7",)},
    ],
)
def test_a_schedule_goes_on_where_it_was(options):
    whole = make_schedule(optimizer(), OptimizerOptions(**options), STEPS)
    expected = rates(whole, STEPS - 1)
    first = make_schedule(optimizer(), OptimizerOptions(**options), STEPS)
    rates(first, 23)
    weights, state = first.optimizer.state_dict(), json.loads(json.dumps(first.state_dict()))
    second = make_schedule(optimizer(), OptimizerOptions(**options), STEPS)
    second.optimizer.load_state_dict(weights)
    second.load_state_dict(state)
    assert rates(second, STEPS - 24) == pytest.approx(expected[23:])
