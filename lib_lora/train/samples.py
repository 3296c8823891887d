"""Pictures that show how far a training is: from a file of prompts in kohya's form."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lib_lora.core.opening import reason_of, shown
from lib_lora.core.saving import save_bytes
from lib_lora.errors import JobError
from lib_lora.train.kohya_options import SAMPLERS
from lib_lora.train.option_values import convert, read_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from lib_lora.core.saving import Progress
    from lib_lora.train.data.class_pictures import ClassPicture

DEFAULT_SAMPLER = "Euler a"

_OPTION = re.compile(r"\s--([a-zA-Z]+)\s+")
_LETTERS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "l": "scale",
    "s": "sample_steps",
    "ss": "sample_sampler",
}
"""kohya's options of a line → the same in its .toml and .json files."""
_FIELDS: dict[str, tuple[str, type]] = {
    "prompt": ("prompt", str),
    "negative_prompt": ("negative", str),
    "width": ("width", int),
    "height": ("height", int),
    "seed": ("seed", int),
    "scale": ("cfg", float),
    "sample_steps": ("steps", int),
    "sample_sampler": ("sampler", str),
}
_SIDE = 8
"""Sides in pixels are multiples of it."""


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
        sampler: The WebUI's name; empty for that of all.
    """

    prompt: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    seed: int = 0
    cfg: float = 7.5
    steps: int = 20
    sampler: str = ""


Draw: TypeAlias = "Callable[[SamplePrompt, str], Image]"
"""Draws with what is learned so far; the second argument is the WebUI's name of a sampler."""


def read_prompts(path: Path) -> list[SamplePrompt]:
    """The prompts of a file as kohya reads it.

    Args:
        path: A .json with a list, a .toml with [prompt] and [[prompt.subset]], or a text with one in each line, where
            empty lines and those that begin with # are none.

    Raises:
        JobError: If the file can not be read, has no prompt, or an option is unknown or no number.
    """
    try:
        prompts = [_read_prompt(told, index) for index, told in _told(path)]
    except (OSError, ValueError) as error:
        raise JobError(f"sample_prompts: {shown(path)} can not be read: {reason_of(error)}") from error
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
        draw(prompt, prompt.sampler or sampler).save(png, "PNG")
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


def _told(path: Path) -> Iterator[tuple[int, Any]]:
    """Place in the file, and what it says of each prompt: a line, or a table."""
    if path.suffix == ".toml":
        return enumerate(_subsets(read_tables(path).get("prompt")))
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        found = json.loads(text)
        return enumerate(found if isinstance(found, list) else [found])
    lines = enumerate(line.strip() for line in text.splitlines())
    return ((index, line) for index, line in lines if line and not line.startswith("#"))


def _subsets(section: Any) -> Iterator[Any]:
    """What [prompt] and each [[prompt.subset]] say together."""
    shared = dict(section) if isinstance(section, dict) else {}
    subsets = shared.pop("subset", {})
    for subset in subsets if isinstance(subsets, list) else [subsets]:
        yield {**shared, **subset} if isinstance(subset, dict) else subset


def _read_prompt(told: Any, seed: int) -> SamplePrompt:
    table = _of_line(told) if isinstance(told, str) else told
    if not isinstance(table, dict) or "prompt" not in table:
        raise JobError(f"sample_prompts: prompt {seed + 1} of the file is none; it needs a text called prompt")
    values: dict[str, Any] = {"seed": seed}
    for key, value in table.items():
        if key not in _FIELDS:
            raise JobError(f"sample_prompts: there is no {key}; there are {', '.join(_FIELDS)}")
        field, kind = _FIELDS[key]
        values[field] = convert(f"sample_prompts: {key}", value, kind)
    sampler = values.get("sampler", "")
    sides = {name: values[name] // _SIDE * _SIDE for name in ("width", "height") if name in values}
    return SamplePrompt(**{**values, **sides, "sampler": SAMPLERS.get(sampler.lower(), sampler)})


def _of_line(line: str) -> dict[str, Any]:
    prompt, *options = _OPTION.split(line)
    table: dict[str, Any] = {"prompt": prompt.strip()}
    for letter, text in zip(options[::2], options[1::2], strict=True):
        if letter.lower() not in _LETTERS:
            raise JobError(
                f"sample_prompts: there is no --{letter}; there are {', '.join(f'--{one}' for one in _LETTERS)}"
            )
        table[_LETTERS[letter.lower()]] = text.strip()
    return table
