"""A slider: the strength of one LoRA moves, the others stay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lib_lora.core.plan import FusePlan, make_plan
from lib_lora.errors import TagError, UnknownLoraError
from lib_lora.prompt.tags import ParsedPrompt, parse_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lib_lora.resolve import ResolvedLora


class Slider:
    """Where the strength of one LoRA of a request is now.

    Attributes:
        parsed: The request with that strength.
        rest: The other LoRAs.
        layers: Where the moving one acts.
    """

    def __init__(self, name: str, text: str, loras: Sequence[ResolvedLora]) -> None:
        """A slider at the strength that is set.

        Raises:
            UnknownLoraError: If no LoRA of that name is active.
        """
        self._name = name
        self._moving = [lora for lora in loras if lora.request.name == name]
        if not self._moving:
            raise UnknownLoraError(f"{name!r} is not active; set it first")
        self.parsed = ParsedPrompt(text, tuple(lora.request for lora in loras))
        self.rest = [lora for lora in loras if lora.request.name != name]
        self.layers = [layer for layer, _ in self._moving[0].match.layers]

    @property
    def can_preview(self) -> bool:
        """Whether its part can be added to weights that hold the others' sum."""
        pairs = self._moving[0].match.layers
        return all(layer.is_rewritable and not adapter.needs_base for layer, adapter in pairs)

    def move(self, strength: float) -> FusePlan:
        """Its part of the plan at another strength.

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
        return make_plan((lora.match, replace(lora.scale, te=strength, unet=strength)) for lora in self._moving)
