"""The modules of a diffusers pipeline that LoRAs act on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_ATTRIBUTES = (
    ("unet", "unet"),
    ("transformer", "transformer"),
    ("te1", "text_encoder"),
    ("te2", "text_encoder_2"),
)


def pipeline_components(pipe: Any) -> dict[str, nn.Module]:
    """Component → module, of those that any object with a pipeline's attributes has."""
    named = ((component, getattr(pipe, attribute, None)) for component, attribute in _ATTRIBUTES)
    return {component: module for component, module in named if module is not None}
