"""``<lora:name:te:unet:dyn>`` tags of a prompt, by the WebUI's rules.

What named arguments mean beside these: block weights in `block_weights`, change in time in `schedule`.

Reading never raises and takes linear time, whatever the text is. Numbers are what Python's ``float`` and ``int`` take,
as in the WebUI: spaces around them, ``1_0`` and full-width digits are fine. Unlike there, a tag with a bad number is
refused alone, and so is one that is not finite.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from lib_lora.errors import TagError
from lib_lora.prompt import block_weights, schedule
from lib_lora.prompt.block_weights import read_blocks
from lib_lora.prompt.schedule import Curve, read_schedule, read_strength_or_curve
from lib_lora.prompt.values import read_rank, read_strength, shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lib_lora.prompt.block_weights import BlockRequest
    from lib_lora.prompt.schedule import Schedule

    Request: TypeAlias = "str | ParsedPrompt | Sequence[tuple[str, float] | tuple[str, float, float]]"

TAG_NAMES = frozenset({"lora", "lyco"})
TAG_PATTERN = re.compile(r"<(\w+):([^>]+)>")
_UNWRITABLE = re.compile("[:>\x00-\x1f\x7f\ud800-\udfff]")
_STRENGTHS = frozenset({"te", "unet", "hr", "hrte", "hrunet"})
_READ_NAMES = _STRENGTHS | {"dyn"} | block_weights.ARGUMENTS | schedule.ARGUMENTS
_POSITIONS = 4


@dataclass(frozen=True)
class LoraRequest:
    """One LoRA that a prompt asks for.

    Attributes:
        name: As written: neither stripped nor looked up yet.
        te: Strength of the text encoders; of a curve, its value in step 0.
        unet: Strength of the UNet; of a curve, its value in step 0.
        dyn: How many ranks of each layer to use, or None for all.
        raw: The whole tag.
        ignored: Arguments that this version gives no meaning, as written.
        blocks: Block weights, or None for 1 everywhere.
        schedule: How the strengths change in time, or None if they do not.
    """

    name: str
    te: float = 1.0
    unet: float = 1.0
    dyn: int | None = None
    raw: str = ""
    ignored: tuple[str, ...] = ()
    blocks: BlockRequest | None = None
    schedule: Schedule | None = None

    def strengths(self, step: int = 0, steps: int = 1) -> tuple[float, float]:
        """Strengths of the text encoders and of the UNet in `step` of `steps`.

        Prompts are encoded once, before step 0, so the first is that of step 0 always.
        """
        if self.schedule is None:
            return self.te, self.unet
        te = self.te if self.schedule.is_on(0, steps) else 0.0
        unet = self.unet if self.schedule.unet is None else self.schedule.unet.at(step, steps)
        return te, unet if self.schedule.is_on(step, steps) else 0.0


@dataclass(frozen=True)
class TagProblem:
    """One tag that is refused.

    Attributes:
        raw: The whole tag.
        message: Why, and what to write instead: one sentence.
    """

    raw: str
    message: str


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt and what its tags ask for.

    Attributes:
        text: The prompt without its LoRA tags; other text is kept as it is.
        requests: Good tags in the order of the text. A LoRA that is named twice is there twice.
        problems: Bad tags in the order of the text.
    """

    text: str
    requests: tuple[LoraRequest, ...] = ()
    problems: tuple[TagProblem, ...] = ()


def parse_prompt(text: str, seed: int = 0, *, hires: bool = False) -> ParsedPrompt:
    """Take ``<lora:…>`` and ``<lyco:…>`` out of a prompt; never raises, linear in the length of `text`.

    Args:
        text: A prompt.
        seed: Of the picture; random block weights are drawn from it.
        hires: Whether it is for the hires pass, which can have its own strengths.

    Source: modules/extra_networks.py and extensions-builtin/Lora of the WebUI 1.10.1, whose results these are.
    """
    requests: list[LoraRequest] = []
    problems: list[TagProblem] = []

    def take(match: re.Match[str]) -> str:
        raw, kind, arguments = match.group(0, 1, 2)
        if kind not in TAG_NAMES:
            return raw
        try:
            requests.append(_read_arguments(raw, arguments, seed, hires))
        except TagError as fault:
            problems.append(_problem(raw, fault))
        return ""

    # Without a ">" ahead, each of many "<lora:" would be searched to the end of the text.
    end = text.rfind(">") + 1
    rest = TAG_PATTERN.sub(take, text[:end]) + text[end:]
    return ParsedPrompt(rest, tuple(requests), tuple(problems))


def parse_numbers(loras: Iterable[Sequence[str | float]]) -> ParsedPrompt:
    """Requests from ``(name, strength)`` and ``(name, te, unet)`` tuples, under the same limits as tags."""
    requests: list[LoraRequest] = []
    problems: list[TagProblem] = []
    for lora in loras:
        raw = ":".join(map(str, lora))
        try:
            requests.append(_read_tuple(lora, raw))
        except TagError as fault:
            problems.append(_problem(raw, fault))
    return ParsedPrompt("", tuple(requests), tuple(problems))


def parse_arguments(
    tags: Iterable[tuple[Sequence[object], Mapping[str, object]]], seed: int = 0, *, hires: bool = False
) -> ParsedPrompt:
    """Requests from tags that a host has split already, by the same rules as `parse_prompt`.

    Args:
        tags: Positional and named arguments of each; values may be numbers.
        seed: As for `parse_prompt`.
        hires: As there.
    """
    requests: list[LoraRequest] = []
    problems: list[TagProblem] = []
    for positional, named in tags:
        texts = [str(value) for value in positional]
        pairs = {key: str(value) for key, value in named.items()}
        raw = f"<lora:{':'.join([*texts, *(f'{key}={value}' for key, value in pairs.items())])}>"
        ignored = [f"{key}={value}" for key, value in pairs.items() if not _has_meaning(key, value)]
        read = {key: value for key, value in pairs.items() if _has_meaning(key, value)}
        try:
            requests.append(_request(raw, texts, read, (*ignored, *texts[_POSITIONS:]), seed, hires))
        except TagError as fault:
            problems.append(_problem(raw, fault))
    return ParsedPrompt("", tuple(requests), tuple(problems))


def parse_request(request: Request) -> ParsedPrompt:
    """Whatever spelling of a request: a prompt, numbers, or one that was parsed already."""
    if isinstance(request, ParsedPrompt):
        return request
    return parse_prompt(request) if isinstance(request, str) else parse_numbers(request)


def writable_name(name: str) -> str:
    """How a tag spells the LoRA `name`: with ``_`` for what would end the name.

    That is ``:``, ``>``, control characters, broken Unicode, and ``=`` if there is exactly one, for that makes a named
    argument.
    """
    spelling = _UNWRITABLE.sub("_", name)
    return spelling.replace("=", "_") if spelling.count("=") == 1 else spelling


def _problem(raw: str, fault: TagError) -> TagProblem:
    return TagProblem(raw, f"{shorten(raw)} is not applied: {fault}")


def _read_arguments(raw: str, arguments: str, seed: int, hires: bool) -> LoraRequest:
    positional: list[str] = []
    named: dict[str, str] = {}
    ignored: list[str] = []
    for argument in arguments.split(":"):
        key, *values = argument.split("=")
        if len(values) != 1:
            positional.append(argument)
        elif _has_meaning(key, values[0]):
            named[key] = values[0]
        else:
            ignored.append(argument)
    return _request(raw, positional, named, (*ignored, *positional[_POSITIONS:]), seed, hires)


def _has_meaning(key: str, value: str) -> bool:
    """Whether a named argument is read. A step alone says nothing, as in LoRA Block Weight."""
    return key in _READ_NAMES and (key != "step" or "-" in value)


def _request(
    raw: str, positional: list[str], named: dict[str, str], ignored: tuple[str, ...], seed: int, hires: bool
) -> LoraRequest:
    """The values of a tag: defaults, then positions, then names, which win."""
    if not positional or not positional[0]:
        raise TagError("it names no LoRA; write <lora:NAME:0.8>")
    name = positional[0]
    te, unet = _strengths(positional, named, hires)
    dyn = read_rank(positional[3]) if len(positional) > 3 else None
    dyn = read_rank(named["dyn"]) if "dyn" in named else dyn
    return LoraRequest(
        name=name,
        te=te.at(0, 1) if isinstance(te, Curve) else te,
        unet=unet.at(0, 1) if isinstance(unet, Curve) else unet,
        dyn=dyn,
        raw=raw,
        ignored=ignored,
        blocks=read_blocks(named, x=positional[3] if len(positional) > 3 else "1", seed=f"{seed}:{name}"),
        schedule=read_schedule(named, te, unet),
    )


def _strengths(positional: Sequence[str], named: Mapping[str, str], hires: bool) -> tuple[float | Curve, float | Curve]:
    """Strengths of the text encoders and of the UNet; in the hires pass its own, which are the first's by default."""
    read = {
        name: read_strength_or_curve(name, text) for name, text in zip(("te", "unet"), positional[1:3], strict=False)
    }
    read |= {name: read_strength_or_curve(name, named[name]) for name in named if name in _STRENGTHS}
    te = read.get("te", 1.0)
    unet = read.get("unet", te)
    if not hires:
        return te, unet
    return read.get("hrte", read.get("hr", te)), read.get("hrunet", read.get("hr", unet))


def _read_tuple(lora: Sequence[str | float], raw: str) -> LoraRequest:
    if len(lora) not in (2, 3) or not isinstance(lora[0], str) or not lora[0]:
        raise TagError("give (name, strength) or (name, te, unet)")
    te = read_strength("te", lora[1])
    return LoraRequest(lora[0], te, read_strength("unet", lora[2]) if len(lora) == 3 else te, raw=raw)
