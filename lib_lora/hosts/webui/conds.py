"""The WebUI's cache of encoded prompts: what changed the text encoder belongs to its key."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules import patches, processing

if TYPE_CHECKING:
    from collections.abc import Callable

OWNER = "prefuse"
METHOD = "cached_params"


def extend_cond_key(state_of: Callable[[Any], tuple[Any, ...]]) -> None:
    """Put the state of the LoRAs into the key under which encoded prompts are kept.

    The WebUI's key knows the text of the tags, not what they lead to: a file that was replaced, a preset that was
    edited or another mode would get an encoding that was made with other weights.

    Args:
        state_of: Called with the generation before each look-up, so right before prompts are encoded.
    """
    restore_cond_key()

    def cached_params(p: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return (*original(p, *args, **kwargs), *state_of(p))

    original = patches.patch(OWNER, processing.StableDiffusionProcessing, METHOD, cached_params)


def restore_cond_key() -> None:
    """The WebUI's own key again."""
    if patches.original(OWNER, processing.StableDiffusionProcessing, METHOD) is not None:
        patches.undo(OWNER, processing.StableDiffusionProcessing, METHOD)
