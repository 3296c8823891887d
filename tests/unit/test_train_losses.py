"""Losses, weights of times and kinds of noise are those of kohya's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import huber_loss, interpolate, l1_loss, mse_loss

from lib_lora.errors import JobError
from lib_lora.train.losses import check_weights, huber_borders, sample_losses, time_weights
from lib_lora.train.noise import NoiseSchedule, draw, learned_noise
from lib_lora.train.options import TrainOptions
from lib_lora.train.settings import LossOptions, NoiseOptions

ROUNDING = 2e-6
"""Of a few float32 operations, relative."""
TIMES = torch.tensor([0, 1, 10, 250, 500, 750, 998, 999])
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)
SNR = [float(ALPHAS[time] / (1 - ALPHAS[time])) for time in TIMES]


def schedule(prediction: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule(ALPHAS.float(), prediction)


def close(ours: torch.Tensor, expected: list[float], error: float = 1e-4) -> bool:
    """float32 of a schedule that was multiplied 1000 times has an error of its own at both ends."""
    return torch.allclose(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=error)


def kinds_of_loss(off: float, c: float) -> dict[str, float]:
    """Of one number that is `off`, as kohya's conditional_loss says."""
    return {
        "l2": off**2,
        "l1": abs(off),
        "huber": 2 * c * (math.sqrt(off**2 + c**2) - c),
        "smooth_l1": 2 * (math.sqrt(off**2 + c**2) - c),
    }


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_each_loss_is_that_of_the_formula(kind):
    predicted, target = torch.randn(2, 3, 4, 8, 8).unbind()
    borders = [0.1, 0.5, 2.0]
    expected = [
        sum(kinds_of_loss(float(off), border)[kind] for off in picture.flatten()) / picture.numel()
        for picture, border in zip(predicted - target, borders, strict=True)
    ]
    given = torch.tensor(borders) if kind in ("huber", "smooth_l1") else None
    assert close(sample_losses(predicted, target, kind, given), expected, 1e-5)


def test_losses_are_those_of_torch_where_it_has_them():
    predicted, target = torch.randn(2, 1, 4, 8, 8).unbind()
    assert torch.allclose(sample_losses(predicted, target, "l2")[0], mse_loss(predicted, target))
    assert torch.allclose(sample_losses(predicted, target, "l1")[0], l1_loss(predicted, target))
    wide = sample_losses(predicted, target, "huber", torch.tensor([1e3]))[0]
    assert torch.allclose(wide, 2 * huber_loss(predicted, target, delta=1e3), rtol=1e-2)  # squares, with no border near


@pytest.mark.parametrize("how", ["snr", "exponential", "constant"])
def test_borders_of_huber_go_with_the_time_as_the_formula_says(how):
    c, scale = 0.2, 1.5
    options = LossOptions(loss_type="huber", huber_schedule=how, huber_c=c, huber_scale=scale)
    sigmas = [math.sqrt(1 / snr) for snr in SNR]
    expected = {
        "snr": [(1 - c) / (1 + sigma) ** 2 + c for sigma in sigmas],
        "exponential": [math.exp(math.log(c) / 1000 * float(time)) * scale for time in TIMES],
        "constant": [c * scale for _ in TIMES],
    }
    borders = huber_borders(schedule(), TIMES, options)
    assert borders is not None
    assert close(borders, expected[how])
    assert huber_borders(schedule(), TIMES, LossOptions()) is None


WEIGHTS = {
    "min_snr_gamma": (5.0, "epsilon", lambda snr: min(snr, 5) / snr),
    "debiased_estimation_loss": (True, "epsilon", lambda snr: 1 / math.sqrt(min(snr, 1000))),
    "v_pred_like_loss": (0.3, "epsilon", lambda snr: 1 + 0.3 / (min(snr, 1000) / (min(snr, 1000) + 1))),
    "scale_v_pred_loss_like_noise_pred": (True, "v_prediction", lambda snr: min(snr, 1000) / (min(snr, 1000) + 1)),
    "debiased_estimation_loss of v": (True, "v_prediction", lambda snr: 1 / (min(snr, 1000) + 1)),
    "min_snr_gamma of v": (5.0, "v_prediction", lambda snr: min(snr, 5) / (snr + 1)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_times_are_those_of_the_formulas(name):
    value, prediction, formula = WEIGHTS[name]
    options = LossOptions(**{name.split()[0]: value})
    assert close(time_weights(schedule(prediction), TIMES, options), [formula(snr) for snr in SNR])


def test_weights_are_multiplied_and_without_any_all_times_count_alike():
    both = LossOptions(min_snr_gamma=5.0, debiased_estimation_loss=True)
    expected = [min(snr, 5) / snr / math.sqrt(min(snr, 1000)) for snr in SNR]
    assert close(time_weights(schedule(), TIMES, both), expected)
    assert torch.equal(time_weights(schedule(), TIMES, LossOptions()), torch.ones(len(TIMES)))


@pytest.mark.parametrize(
    ("options", "prediction", "sentence"),
    [
        ({"scale_v_pred_loss_like_noise_pred": True}, "epsilon", "this one predicts noise"),
        ({"v_pred_like_loss": 0.1}, "v_prediction", "this one predicts v"),
        ({"debiased_estimation_loss": True, "zero_terminal_snr": True}, "epsilon", "max_timestep 999"),
    ],
)
def test_weights_that_do_not_go_with_the_model_are_refused(options, prediction, sentence):
    with pytest.raises(JobError, match=sentence):
        check_weights(schedule(prediction), LossOptions(**options))


def test_weights_of_the_last_time_are_finite_where_they_are_allowed():
    zero = NoiseSchedule(torch.cat([ALPHAS[:-1].float(), torch.zeros(1)]), "v_prediction")
    options = LossOptions(debiased_estimation_loss=True, zero_terminal_snr=True, min_snr_gamma=5.0)
    check_weights(zero, options)
    assert time_weights(zero, TIMES, options).isfinite().all()


PLACES = range(200)
SHAPE = (4, 8, 8)
LATENTS = torch.randn(len(PLACES), *SHAPE, generator=torch.Generator().manual_seed(0)) + 0.7


def noises(**given) -> tuple[torch.Tensor, torch.Tensor]:
    """Without and with options."""
    options = NoiseOptions(**given)
    plain, drawn = draw(3, PLACES, SHAPE, (0, 1000)), draw(3, PLACES, SHAPE, (0, 1000), options)
    assert torch.equal(plain.noise, drawn.noise)
    assert torch.equal(plain.times, drawn.times)
    assert torch.equal(plain.encoding, drawn.encoding)
    return plain.noise, learned_noise(drawn, LATENTS, options)


def test_an_offset_of_random_strength_is_between_nothing_and_all():
    plain, moved = noises(noise_offset=0.5, noise_offset_random_strength=True)
    full = noises(noise_offset=0.5)[1]
    parts = ((moved - plain) / (full - plain)).mean((1, 2, 3))
    assert parts.min() > 0
    assert parts.max() < 1
    assert abs(parts.mean() - 0.5) < 0.1  # of 200 pictures, each its own


def test_an_adaptive_offset_grows_with_the_mean_of_the_channel():
    plain, moved = noises(noise_offset=0.05, adaptive_noise_scale=0.2)
    full = noises(noise_offset=1.0)[1]
    strengths = (moved - plain).mean((2, 3)) / (full - plain).mean((2, 3))
    expected = 0.05 + 0.2 * LATENTS.mean((2, 3)).abs()
    assert torch.allclose(strengths, expected, rtol=1e-2)
    lowered = noises(noise_offset=0.05, adaptive_noise_scale=-1.0)[1]
    assert torch.equal(lowered, plain)  # 0.05 - 0.7 is no strength


def test_noise_of_coarser_sizes_is_smooth_and_as_strong_as_plain_noise():
    plain, coarse = noises(multires_noise_iterations=6, multires_noise_discount=0.8)
    assert torch.allclose(coarse.flatten(1).std(1), torch.ones(len(PLACES)), rtol=1e-5)
    neighbours = [float((noise[..., :-1] * noise[..., 1:]).mean()) for noise in (plain, coarse)]
    assert abs(neighbours[0]) < 0.05
    assert neighbours[1] > 0.2


def test_noise_of_coarser_sizes_is_that_of_the_formula():
    """As pyramid_noise_like: Σ discount^i · noise of size / r^i enlarged, r from 2 to 4; divided by its deviation."""
    discount, seen = 0.7, []
    options = NoiseOptions(multires_noise_iterations=3, multires_noise_discount=discount)
    drawn = draw(5, [0], (2, 16, 16), (0, 1000), options)
    assert drawn.coarse is not None
    chance = torch.Generator().manual_seed(_seed_of(5, 0))
    torch.randn(2, 16, 16, generator=chance)
    torch.randint(0, 1000, (), generator=chance)
    torch.randn(2, 16, 16, generator=chance)
    expected = torch.zeros(1, 2, 16, 16)
    for index in range(3):
        ratio = torch.rand((), generator=chance).item() * 2 + 2
        side = max(1, int(16 / ratio**index))
        seen.append(side)
        small = torch.randn(1, 2, side, side, generator=chance)
        expected += interpolate(small, (16, 16), mode="bilinear") * discount**index
    assert seen[0] == 16
    assert 4 <= seen[1] <= 8
    assert torch.allclose(drawn.coarse, expected[0], rtol=ROUNDING, atol=ROUNDING)
    noise = drawn.noise + expected
    assert torch.allclose(learned_noise(drawn, LATENTS, options), noise / noise.std(), rtol=1e-5, atol=1e-6)


def _seed_of(seed: int, place: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + place) % 2**63


def test_more_noise_is_on_the_picture_than_is_learned():
    options = NoiseOptions(ip_noise_gamma=0.1)
    drawn = draw(3, PLACES, SHAPE, (0, 1000), options)
    assert drawn.unasked is not None
    assert torch.equal(learned_noise(drawn, LATENTS, options), drawn.noise)
    assert abs(drawn.unasked.std() - 0.1) < 0.003
    weaker = draw(3, PLACES, SHAPE, (0, 1000), NoiseOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True))
    assert weaker.unasked is not None
    strengths = weaker.unasked.flatten(1).std(1)
    assert strengths.max() < 0.12
    assert strengths.min() < 0.02


def test_all_of_it_depends_on_seed_and_place_alone():
    options = NoiseOptions(
        noise_offset=0.1, noise_offset_random_strength=True, multires_noise_iterations=4, ip_noise_gamma=0.1
    )
    together, alone = (draw(7, places, SHAPE, (0, 1000), options) for places in ([3, 4, 5], [4]))
    parts = vars(alone)
    assert all(part is not None for part in parts.values())
    assert all(torch.equal(getattr(together, name)[1], part[0]) for name, part in parts.items())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"adaptive_noise_scale": 0.1}, "adaptive_noise_scale changes noise_offset"),
        ({"huber_c": 0}, "huber_c must be above 0, not 0"),
        ({"loss_type": "l3"}, "loss_type must be one of l2, l1, huber, smooth_l1, not 'l3'"),
        ({"multires_noise_iterations": -1}, "multires_noise_iterations must be at least 1"),
        ({"v_pred_like_loss": 0.1, "scale_v_pred_loss_like_noise_pred": True}, "leave one out"),
    ],
)
def test_what_can_not_be_is_refused(values, sentence):
    with pytest.raises(JobError, match=sentence):
        TrainOptions.of(values)
