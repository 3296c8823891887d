"""From a prompt with ``<lora:…>`` tags to pictures and how they were made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lib_lora import __version__
from lib_lora.errors import RequestError
from lib_lora.hosts.standalone.infotext import Infotext
from lib_lora.hosts.standalone.samplers import DEFAULT_SAMPLER, make_scheduler
from lib_lora.pipelines import step_callback
from lib_lora.prompt.tags import parse_prompt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from lib_lora.hosts.standalone.loading import LoadedModel
    from lib_lora.report import SessionReport
    from lib_lora.session import LoraSession

SIZE_STEP = 8
SEEDS = 2**32


@dataclass(frozen=True)
class GenerateRequest:
    """What to draw.

    Attributes:
        prompt: With tags.
        negative: Negative prompt; tags mean nothing in it.
        steps: Sampling steps.
        cfg: Guidance scale; 1 or less switches guidance off.
        seed: Of the first picture; the next ones count up.
        width: In pixels, a multiple of 8; None for the model's own.
        height: As `width`.
        sampler: The WebUI's name.
        count: Number of pictures.
    """

    prompt: str
    negative: str = ""
    steps: int = 20
    cfg: float = 7.0
    seed: int = 0
    width: int | None = None
    height: int | None = None
    sampler: str = DEFAULT_SAMPLER
    count: int = 1

    def check(self) -> None:
        """Refuse what can not be drawn.

        Raises:
            RequestError: If a number is out of its range.
        """
        for name, size in (("width", self.width), ("height", self.height)):
            if size is not None and (size < SIZE_STEP or size % SIZE_STEP):
                raise RequestError(f"The {name} must be a multiple of {SIZE_STEP} pixels, not {size}.")
        if self.steps < 1 or self.count < 1:
            raise RequestError(f"At least 1 step and 1 picture are needed, not {self.steps} and {self.count}.")
        if not math.isfinite(self.cfg):
            raise RequestError(f"The guidance scale must be a number, not {self.cfg}.")
        if not 0 <= self.seed <= SEEDS - self.count:
            raise RequestError(f"The seed must be from 0 to {SEEDS - self.count}, not {self.seed}.")


@dataclass(frozen=True)
class GeneratedImage:
    """A picture, how it was made, and what the LoRAs did."""

    image: Image
    infotext: Infotext
    report: SessionReport


def generate(
    loaded: LoadedModel, session: LoraSession, request: GenerateRequest, *, progress: bool = False
) -> list[GeneratedImage]:
    """Set the LoRAs of the prompt and draw.

    Args:
        loaded: The model that `session` works on.
        session: Its weights are as the prompt asks afterwards.
        request: What to draw.
        progress: Whether to show a bar.

    Raises:
        RequestError: If a number is out of range, there is no such sampler, or a picture is NaN.
        ApplyError: If the LoRAs could not be written; the base weights are back.
    """
    request.check()
    pipe = loaded.pipe
    pipe.scheduler = make_scheduler(request.sampler, loaded.scheduler)
    pipe.set_progress_bar_config(disable=not progress)
    seeds = range(request.seed, request.seed + request.count)
    with session.lease():
        return [_generate(loaded, session, request, seed) for seed in seeds]


def _generate(loaded: LoadedModel, session: LoraSession, request: GenerateRequest, seed: int) -> GeneratedImage:
    """One picture, with the LoRAs as its seed makes them."""
    session.set(parse_prompt(request.prompt, seed))
    image = _draw(loaded, session, request, seed)
    report = session.report
    names = [lora.name for lora in report.applied]
    hashes = session.catalog.lora_hashes([session.catalog.find(name) for name in names], names)
    resolved = " ".join(lora.resolved for lora in report.applied if lora.resolved)
    loras = {"Lora hashes": hashes, "Lora resolved": resolved}
    return GeneratedImage(image, _infotext(loaded, request, image, seed, loras), report)


def _draw(loaded: LoadedModel, session: LoraSession, request: GenerateRequest, seed: int) -> Image:
    """One picture, with the LoRAs that are set."""
    options: dict[str, Any] = {
        "negative_prompt": request.negative or None,
        "num_inference_steps": request.steps,
        "guidance_scale": request.cfg,
        "width": request.width or loaded.size,
        "height": request.height or loaded.size,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "np",
        "callback_on_step_end": step_callback(session.advance),
        "callback_on_step_end_tensor_inputs": [],
    }
    pixels = loaded.pipe(session.report.text, **options).images[0]
    if not math.isfinite(float(pixels.sum())):
        dtype = loaded.pipe.unet.dtype
        raise RequestError(f"The picture of seed {seed} is not a number (NaN) in {dtype}; try --dtype fp32 or bf16.")
    return loaded.pipe.numpy_to_pil(pixels)[0]


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
        **loras,
        "Version": f"Prefuse {__version__}",
    }
    filled = {key: value for key, value in parameters.items() if value}
    return Infotext(request.prompt, request.negative, filled)
