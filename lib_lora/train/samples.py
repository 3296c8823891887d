"""Pictures that show how far a training is: from a file of prompts in kohya's form."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lib_lora.core.opening import shown
from lib_lora.core.saving import save_bytes
from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from lib_lora.core.saving import Progress
    from lib_lora.train.data.class_pictures import ClassPicture

DEFAULT_SAMPLER = "Euler a"

_OPTION = re.compile(r"\s--([a-z]+)\s+")
_FIELDS: dict[str, tuple[str, type]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "l": ("cfg", float),
    "s": ("steps", int),
}


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to draw.

    Attributes:
        prompt: With tags of other LoRAs.
        negative: Negative prompt.
        width: In pixels; None for the model's own.
        height: As `width`.
        seed: Of the picture.
        cfg: Guidance scale.
        steps: Sampling steps.
    """

    prompt: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    seed: int = 0
    cfg: float = 7.5
    steps: int = 20


Draw: TypeAlias = "Callable[[SamplePrompt, str], Image]"
"""Draws with what is learned so far; the second argument is the WebUI's name of a sampler."""


def read_prompts(path: Path) -> list[SamplePrompt]:
    """The prompts of a text file, one in a line; empty lines and those that begin with # are none.

    Raises:
        JobError: If the file can not be read, has no prompt, or an option is unknown or no number.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise JobError(f"sample_prompts: {shown(path)} can not be read: {error}") from error
    prompts = [_read_prompt(line, index) for index, line in enumerate(lines) if line and not line.startswith("#")]
    if not prompts:
        raise JobError(f"sample_prompts: {shown(path)} has no prompt; write one in each line")
    return prompts


def draw_samples(draw: Draw, prompts: Sequence[SamplePrompt], sampler: str, folder: Path, name: str) -> list[Path]:
    """Draw every prompt into PNG files ``NAME_00.png`` and so on; older ones of that name are replaced.

    Raises:
        PrefuseError: If a picture can not be drawn or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{index:02d}.png" for index in range(len(prompts))]
    for path, prompt in zip(paths, prompts, strict=True):
        png = io.BytesIO()
        draw(prompt, sampler).save(png, "PNG")
        save_bytes(path, png.getvalue(), overwrite=True)
    return paths


def draw_class_pictures(
    missing: Sequence[ClassPicture], draw: Draw | None, size: tuple[int, int], progress: Progress
) -> None:
    """Draw regularisation pictures with the model as it is.

    Args:
        missing: Which.
        draw: Draws them.
        size: Their width and height in pixels.
        progress: Told the pictures that were drawn.

    Raises:
        JobError: If there is nothing that can draw.
        PrefuseError: If one can not be drawn or written.
    """
    if missing and draw is None:
        raise JobError(f"{len(missing)} regularisation pictures are missing and can not be drawn here; add them")
    for done, picture in enumerate(missing, 1):
        if draw is not None:
            prompt = SamplePrompt(picture.prompt, width=size[0], height=size[1], seed=picture.seed)
            picture.save(draw(prompt, DEFAULT_SAMPLER))
        progress(done, len(missing))


def _read_prompt(line: str, seed: int) -> SamplePrompt:
    prompt, *options = _OPTION.split(line)
    values: dict[str, Any] = {"seed": seed}
    for key, text in zip(options[::2], options[1::2], strict=True):
        if key not in _FIELDS:
            raise JobError(f"sample_prompts: there is no --{key}; there are {', '.join(f'--{one}' for one in _FIELDS)}")
        field, kind = _FIELDS[key]
        try:
            values[field] = kind(text.strip())
        except ValueError as error:
            raise JobError(f"sample_prompts: --{key} {text.strip()!r} is no number") from error
    return SamplePrompt(prompt.strip(), **values)
