"""What the page needs of the program that it is a part of: the WebUI, or our own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lib_lora.errors import RequestError
from lib_lora.report import SessionReport

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from PIL.Image import Image

    from lib_lora.catalog import LoraCatalog
    from lib_lora.compile.protocol import CompileStatus
    from lib_lora.core.keymap import KeyMap
    from lib_lora.core.saving import Progress
    from lib_lora.presets import PresetFiles

DEFAULT_SAMPLER = "Euler a"
SIZE_STEP = 8
SEEDS = 2**32


@dataclass(frozen=True)
class Control:
    """What a ControlNet is given.

    Attributes:
        image: In RGB, as the ControlNet reads it (edges, depths, …); of any size.
        scale: How much it counts.
        name: Of the picture's file.
    """

    image: Image
    scale: float = 1.0
    name: str = ""


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
        controls: One for each ControlNet of the model.
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
    controls: tuple[Control, ...] = ()

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
        for name, number in (("guidance", self.cfg), *(("control", control.scale) for control in self.controls)):
            if not math.isfinite(number):
                raise RequestError(f"The {name} scale must be a number, not {number}.")
        if not 0 <= self.seed <= SEEDS - self.count:
            raise RequestError(f"The seed must be from 0 to {SEEDS - self.count}, not {self.seed}.")


@dataclass(frozen=True)
class Picture:
    """A picture, how it was made, and what the LoRAs did.

    Attributes:
        image: The pixels.
        infotext: As the WebUI writes it.
        report: Of the last change of LoRAs that it needed.
        path: Where it was saved, with the infotext in it; None if it was not.
    """

    image: Image
    infotext: str = ""
    report: SessionReport = field(default_factory=SessionReport)
    path: Path | None = None


class Host(Protocol):
    """The program around the page. Its methods may be called from any thread."""

    @property
    def can_draw(self) -> bool:
        """Whether the page itself has to offer making pictures."""
        ...

    @property
    def catalog(self) -> LoraCatalog:
        """The LoRA folders; new LoRAs are written to the first."""
        ...

    @property
    def presets(self) -> PresetFiles:
        """Files with presets of block weights."""
        ...

    @property
    def model_folder(self) -> Path:
        """Where new checkpoints are written."""
        ...

    @property
    def picture_folder(self) -> Path:
        """Where pictures, plots and tables are written."""
        ...

    def models(self) -> Mapping[str, Path]:
        """Name → checkpoint file or diffusers folder, of all that can be chosen."""
        ...

    def model(self) -> str:
        """Name of the model that pictures are made with."""
        ...

    def use_model(self, name: str) -> None:
        """Make pictures with another of `models`.

        Raises:
            ModelError: If it can not be loaded; the former one stays.
        """
        ...

    def without_model(self) -> AbstractContextManager[None]:
        """Inside of it the model that draws leaves the GPU's memory to others, and nothing is drawn."""
        ...

    def keymap(self) -> KeyMap | None:
        """Layers of the loaded model; None if there is none."""
        ...

    def compile_status(self) -> CompileStatus:
        """How the model runs; asked often, so it must be quick."""
        ...

    def compiler(self) -> str:
        """What models are compiled with: one of `lib_lora.compile.choose.BACKENDS`, or ``off``."""
        ...

    def use_compiler(self, name: str) -> None:
        """Compile models with another backend, this one too."""
        ...

    def samplers(self) -> list[str]:
        """Names that a request can have."""
        ...

    def generate(self, request: GenerateRequest, progress: Progress, *, save: bool = True) -> list[Picture]:
        """Draw.

        Args:
            request: What to draw.
            progress: Told the steps done of all steps; what it raises ends the drawing.
            save: Whether pictures go to `picture_folder`.

        Raises:
            PrefuseError: If that can not be drawn.
        """
        ...
