"""The WebUI's sampler names and the diffusers schedulers that do the same."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from lib_lora.errors import RequestError
from lib_lora.hosts.standalone.libraries import diffusers_class

if TYPE_CHECKING:
    from collections.abc import Mapping


class Sampler(NamedTuple):
    """A scheduler class of diffusers and what it is told beside the model's own settings."""

    scheduler: str
    options: Mapping[str, Any]


# The WebUI's k-diffusion samplers space their steps evenly from the last training step to the first.
_EVEN: Mapping[str, Any] = {"timestep_spacing": "linspace", "use_karras_sigmas": False}
_KARRAS = {**_EVEN, "use_karras_sigmas": True}
_ANCESTRAL = {"timestep_spacing": "linspace"}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
_SDE = {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}

SAMPLERS: Mapping[str, Sampler] = {
    "Euler a": Sampler("EulerAncestralDiscreteScheduler", _ANCESTRAL),
    "Euler": Sampler("EulerDiscreteScheduler", _EVEN),
    "Euler Karras": Sampler("EulerDiscreteScheduler", _KARRAS),
    "Heun": Sampler("HeunDiscreteScheduler", _EVEN),
    "DPM2": Sampler("KDPM2DiscreteScheduler", _EVEN),
    "DPM2 Karras": Sampler("KDPM2DiscreteScheduler", _KARRAS),
    "DPM2 a": Sampler("KDPM2AncestralDiscreteScheduler", _EVEN),
    "DPM2 a Karras": Sampler("KDPM2AncestralDiscreteScheduler", _KARRAS),
    "DPM++ 2M": Sampler("DPMSolverMultistepScheduler", _EVEN),
    "DPM++ 2M Karras": Sampler("DPMSolverMultistepScheduler", _KARRAS),
    "DPM++ 2M SDE": Sampler("DPMSolverMultistepScheduler", {**_EVEN, **_SDE}),
    "DPM++ 2M SDE Karras": Sampler("DPMSolverMultistepScheduler", {**_KARRAS, **_SDE}),
    "DPM++ SDE": Sampler("DPMSolverSinglestepScheduler", {"use_karras_sigmas": False, **_SDE}),
    "DPM++ SDE Karras": Sampler("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True, **_SDE}),
    "DDIM": Sampler("DDIMScheduler", {**_LEADING, "clip_sample": False}),
    "PLMS": Sampler("PNDMScheduler", {**_LEADING, "skip_prk_steps": True}),
    "UniPC": Sampler("UniPCMultistepScheduler", _EVEN),
    "LCM": Sampler("LCMScheduler", {"clip_sample": False}),
}


def make_scheduler(name: str, settings: Mapping[str, Any]) -> Any:
    """A new scheduler.

    Args:
        name: The WebUI's name, such as ``DPM++ 2M Karras``; upper and lower case are the same.
        settings: The configuration of the scheduler that came with the model: noise schedule and prediction type.

    Raises:
        RequestError: If there is no such sampler.
    """
    sampler = {key.lower(): value for key, value in SAMPLERS.items()}.get(name.lower())
    if sampler is None:
        close = get_close_matches(name, SAMPLERS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise RequestError(f"There is no sampler {name!r}; {hint}there are {', '.join(SAMPLERS)}.")
    return diffusers_class(sampler.scheduler).from_config(dict(settings), **sampler.options)
