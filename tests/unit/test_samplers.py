"""The WebUI's samplers as diffusers' schedulers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from lib_lora.errors import RequestError
from lib_lora.hosts.host import DEFAULT_SAMPLER
from lib_lora.hosts.standalone.samplers import SAMPLERS, make_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STEPS = 4
SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
BETAS = np.linspace(SETTINGS["beta_start"] ** 0.5, SETTINGS["beta_end"] ** 0.5, 1000) ** 2
LEVELS = np.sqrt(1 / np.cumprod(1 - BETAS) - 1)
# k-diffusion: model_wrap.get_sigmas and get_sigmas_karras with rho = 7, without the final 0.
EVEN = np.exp(np.interp(np.linspace(999, 0, STEPS), np.arange(1000), np.log(LEVELS)))
KARRAS = np.linspace(LEVELS[-1] ** (1 / 7), LEVELS[0] ** (1 / 7), STEPS) ** 7
TOLERANCE = 1e-4
EXACT_TOLERANCE = 1e-4
# The noise of the first training step stays: sqrt(1 - alpha) = 0.03 times a noise of up to 4.
LAST_STEP_TOLERANCE = 0.2
ENDS_AT_STEP_0 = ("DDIM", "PLMS")
DETERMINISTIC = (
    "Euler",
    "Euler Karras",
    "Heun",
    "DPM2",
    "DPM2 Karras",
    "DPM++ 2M",
    "DPM++ 2M Karras",
    "DDIM",
    "PLMS",
    "UniPC",
)
PATH_TOLERANCE = 0.07


def sample(name, prediction, steps, picture_of):
    """Run a sampler with a denoiser that knows the answer; returns the noise it began with and the result.

    `picture_of`: noisy sample and its alpha (share of the picture's variance) → the picture to be expected.
    """
    scheduler = make_scheduler(name, SETTINGS | {"prediction_type": prediction})
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    latent = noise * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latent, step)
        alpha = 1 / (1 + np.exp(np.interp(float(step), np.arange(1000), np.log(LEVELS))) ** 2)
        picture = picture_of(model_input, alpha)
        predicted_noise = (model_input - alpha**0.5 * picture) / (1 - alpha) ** 0.5
        velocity = alpha**0.5 * predicted_noise - (1 - alpha) ** 0.5 * picture
        answer = predicted_noise if prediction == "epsilon" else velocity
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latent = scheduler.step(answer, step, latent, **options).prev_sample
    return noise, latent


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_sampler_ends_at_the_picture_that_the_model_sees(name, prediction):
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    _, result = sample(name, prediction, STEPS, lambda noisy, alpha: picture)
    tolerance = LAST_STEP_TOLERANCE if name in ENDS_AT_STEP_0 else EXACT_TOLERANCE
    torch.testing.assert_close(result, picture, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_follow_the_known_path_of_a_gaussian(name):
    """For pictures of N(0, std²) the path from a noise ends at std times that noise."""
    std = 0.5

    def mean_picture(noisy, alpha):
        return noisy * alpha**0.5 * std**2 / (alpha * std**2 + 1 - alpha)

    noise, result = sample(name, "epsilon", 40, mean_picture)
    assert ((result - std * noise).std() / std).item() < PATH_TOLERANCE


@pytest.mark.parametrize(("name", "sigmas"), [("Euler", EVEN), ("Euler Karras", KARRAS), ("DPM++ 2M Karras", KARRAS)])
def test_noise_levels_are_those_of_the_webuis_samplers(name, sigmas):
    scheduler = make_scheduler(name, SETTINGS)
    scheduler.set_timesteps(STEPS)
    assert scheduler.sigmas[:STEPS].tolist() == pytest.approx(sigmas.tolist(), rel=TOLERANCE)


def test_upper_and_lower_case_do_not_matter():
    assert type(make_scheduler("dpm++ 2m karras", SETTINGS)) is type(make_scheduler("DPM++ 2M Karras", SETTINGS))


def test_the_default_is_in_the_table():
    assert DEFAULT_SAMPLER in SAMPLERS


def test_an_unknown_sampler_is_a_sentence_with_the_nearest_name_and_all_names():
    with pytest.raises(RequestError) as refused:
        make_scheduler("Euler b", SETTINGS)
    message = str(refused.value)
    assert "did you mean Euler" in message
    assert all(name in message for name in SAMPLERS)


def test_a_samplers_options_do_not_stay_in_the_models_settings():
    settings = dict(SETTINGS)
    make_scheduler("Euler Karras", settings)
    assert settings == SETTINGS
    assert not make_scheduler("Euler", settings).config.use_karras_sigmas
