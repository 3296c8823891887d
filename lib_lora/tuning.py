"""A slider: the strength of one LoRA moves, the others stay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lib_lora.core.ways import Ways
from lib_lora.errors import TagError, UnknownLoraError
from lib_lora.moving import holdable
from lib_lora.prompt.tags import ParsedPrompt, parse_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lib_lora.resolve import ResolvedLora


class Slider:
    """Where the strength of one LoRA of a request is now.

    Attributes:
        parsed: The request with that strength.
        ways: The others' sum is held where the LoRA can be added to it.
    """

    def __init__(self, name: str, text: str, loras: Sequence[ResolvedLora]) -> None:
        """A slider at the strength that is set.

        Raises:
            UnknownLoraError: If no LoRA of that name is active.
        """
        self._name = name
        self._loras = loras
        moving = [lora for lora in loras if lora.request.name == name]
        if not moving:
            raise UnknownLoraError(f"{name!r} is not active; set it first")
        self.parsed = ParsedPrompt(text, tuple(lora.request for lora in loras))
        uids = frozenset({moving[0].network.uid})
        self.ways = Ways(held=dict.fromkeys(holdable(moving[0].match.layers), uids))

    def move(self, strength: float) -> list[ResolvedLora]:
        """All LoRAs, this one at another strength.

        Raises:
            TagError: If the strength is not finite or beyond the limits of a tag.
        """
        if problems := parse_numbers([(self._name, strength)]).problems:
            raise TagError(problems[0].message)
        requests = (
            replace(request, te=strength, unet=strength, schedule=None) if request.name == self._name else request
            for request in self.parsed.requests
        )
        self.parsed = replace(self.parsed, requests=tuple(requests))
        return [
            replace(lora, scale=replace(lora.scale, te=strength, unet=strength))
            if lora.request.name == self._name
            else lora
            for lora in self._loras
        ]
