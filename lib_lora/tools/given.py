"""LoRAs that a job is given: files with strengths, or the tags of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib_lora.catalog import CatalogEntry
from lib_lora.core.files import FileIdentity
from lib_lora.errors import FileError, JobError, TagError
from lib_lora.prompt.tags import parse_arguments, parse_prompt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lib_lora.catalog import LoraCatalog
    from lib_lora.prompt.tags import LoraRequest, ParsedPrompt


class GivenLora(NamedTuple):
    """What is asked for, and the file that is meant."""

    request: LoraRequest
    entry: CatalogEntry


def given_files(texts: Iterable[str]) -> list[GivenLora]:
    """LoRAs from ``FILE[:TE[:UNET[:DYN]]][:key=value…]`` each, with the arguments of a tag.

    Raises:
        FileError: If there is no such file.
        TagError: If an argument is no usable number.
    """
    loras: list[GivenLora] = []
    for text in texts:
        path, arguments = _split(text)
        positional = [argument for argument in arguments if "=" not in argument]
        named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        parsed = _without_problems(parse_arguments([((path.stem, *positional), named)]))
        entry = CatalogEntry(path.stem, path, path.stem, FileIdentity.of(path))
        loras.append(GivenLora(parsed.requests[0], entry))
    return loras


def prompted_loras(prompt: str, catalog: LoraCatalog) -> list[GivenLora]:
    """The LoRAs of a prompt's tags, looked up as in generation.

    Raises:
        JobError: If it has no tag.
        TagError: If a tag is refused.
        UnknownLoraError: If a name is not in the folders.
    """
    parsed = _without_problems(parse_prompt(prompt))
    if not parsed.requests:
        raise JobError("the prompt names no LoRA; write <lora:NAME:0.8>")
    return [GivenLora(request, catalog.find(request.name)) for request in parsed.requests]


def _split(text: str) -> tuple[Path, list[str]]:
    """The longest beginning that is a file, for a path may hold colons itself."""
    parts = text.split(":")
    for count in range(len(parts), 0, -1):
        path = Path(":".join(parts[:count]))
        if path.is_file():
            return path, parts[count:]
    raise FileError(f"there is no LoRA file {text!r}; write FILE, FILE:0.8 or FILE:0.8:0.5 (text encoder, UNet)")


def _without_problems(parsed: ParsedPrompt) -> ParsedPrompt:
    if parsed.problems:
        raise TagError(parsed.problems[0].message)
    return parsed
