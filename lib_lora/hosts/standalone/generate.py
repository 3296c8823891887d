"""From a prompt with ``<lora:…>`` tags to pictures and how they were made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lib_lora import __version__
from lib_lora.core.saving import no_progress
from lib_lora.errors import RequestError
from lib_lora.hosts.standalone.controls import check_count, control_notes, control_options, control_parameters
from lib_lora.hosts.standalone.infotext import Infotext
from lib_lora.hosts.standalone.samplers import make_scheduler
from lib_lora.pipelines import step_callback
from lib_lora.prompt.tags import parse_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from PIL.Image import Image

    from lib_lora.core.saving import Progress
    from lib_lora.hosts.host import GenerateRequest
    from lib_lora.hosts.standalone.loading import LoadedModel
    from lib_lora.report import SessionReport
    from lib_lora.session import LoraSession


@dataclass(frozen=True)
class GeneratedImage:
    """A picture, how it was made, and what the LoRAs did."""

    image: Image
    infotext: Infotext
    report: SessionReport


def generate(
    loaded: LoadedModel, session: LoraSession, request: GenerateRequest, *, progress: Progress = no_progress
) -> list[GeneratedImage]:
    """Set the LoRAs of the prompt and draw.

    Args:
        loaded: The model that `session` works on.
        session: Its weights are as the prompt asks afterwards.
        request: What to draw.
        progress: Told the calls of the model done, of all; what it raises ends the drawing.

    Raises:
        RequestError: If a number is out of range, there is no such sampler, there is not one picture for each
            ControlNet, or a picture is NaN.
        ApplyError: If the LoRAs could not be written; the base weights are back.
    """
    request.check()
    check_count(len(request.controls), len(loaded.controlnets))
    pipe = loaded.pipe
    pipe.scheduler = make_scheduler(request.sampler, loaded.scheduler)
    pipe.set_progress_bar_config(disable=True)
    with session.lease():
        return [_generate(loaded, session, request, index, progress) for index in range(request.count)]


def _generate(
    loaded: LoadedModel, session: LoraSession, request: GenerateRequest, index: int, progress: Progress
) -> GeneratedImage:
    """One picture, with the LoRAs as its seed makes them."""
    seed = request.seed + index
    session.set(parse_prompt(request.prompt, seed))

    def called(calls: int, of: int) -> None:
        progress(index * of + calls, request.count * of)

    image = _draw(loaded, session, request, seed, called)
    report = session.report
    names = [lora.name for lora in report.applied]
    hashes = session.catalog.lora_hashes([session.catalog.find(name) for name in names], names)
    resolved = " ".join(lora.resolved for lora in report.applied if lora.resolved)
    follows = "True" if session.keymap.control_follows and loaded.controlnets else ""
    loras = {"Lora hashes": hashes, "Lora resolved": resolved, "Loras in ControlNet": follows}
    notes = control_notes(request.controls, image.width, image.height)
    told = replace(report, notes=(*report.notes, *notes))
    return GeneratedImage(image, _infotext(loaded, request, image, seed, loras), told)


def _draw(loaded: LoadedModel, session: LoraSession, request: GenerateRequest, seed: int, progress: Progress) -> Image:
    """One picture, with the LoRAs that are set."""
    width, height = request.width or loaded.size, request.height or loaded.size
    options: dict[str, Any] = {
        "negative_prompt": request.negative or None,
        "num_inference_steps": request.steps,
        "guidance_scale": request.cfg,
        "width": width,
        "height": height,
        **control_options(request.controls, width, height),
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "np",
        "callback_on_step_end": _step_end(session, progress),
        "callback_on_step_end_tensor_inputs": [],
    }
    pixels = loaded.pipe(session.report.text, **options).images[0]
    if not math.isfinite(float(pixels.sum())):
        dtype = loaded.pipe.unet.dtype
        raise RequestError(f"The picture of seed {seed} is not a number (NaN) in {dtype}; try --dtype fp32 or bf16.")
    return loaded.pipe.numpy_to_pil(pixels)[0]


def _step_end(session: LoraSession, progress: Progress) -> Callable[..., dict[str, Any]]:
    move = step_callback(session.advance)

    def on_step_end(pipe: Any, call: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        progress(call + 1, pipe.num_timesteps)
        return move(pipe, call, timestep, tensors)

    return on_step_end


def _infotext(
    loaded: LoadedModel, request: GenerateRequest, image: Image, seed: int, loras: Mapping[str, str]
) -> Infotext:
    parameters = {
        "Steps": f"{request.steps}",
        "Sampler": request.sampler,
        "CFG scale": f"{request.cfg:g}",
        "Seed": f"{seed}",
        "Size": f"{image.width}x{image.height}",
        "Model hash": loaded.short_hash,
        "Model": loaded.name,
        **control_parameters(loaded.controlnets, request.controls),
        **loras,
        "Version": f"Prefuse {__version__}",
    }
    filled = {key: value for key, value in parameters.items() if value}
    return Infotext(request.prompt, request.negative, filled)
