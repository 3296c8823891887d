"""The WebUI's samplers as diffusers' schedulers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib_lora.errors import RequestError
from lib_lora.hosts.standalone.samplers import DEFAULT_SAMPLER, SAMPLERS, make_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

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


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_sampler_denoises_a_latent_with_the_models_settings(name, prediction):
    scheduler = make_scheduler(name, SETTINGS | {"prediction_type": prediction})
    assert scheduler.config.beta_end == SETTINGS["beta_end"]
    assert scheduler.config.prediction_type == prediction
    scheduler.set_timesteps(STEPS)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latent, step)
        latent = scheduler.step(torch.zeros_like(model_input), step, latent).prev_sample
    assert latent.isfinite().all()


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
