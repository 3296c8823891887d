"""The modules of a diffusers pipeline that LoRAs act on, and those that are worth compiling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib_lora.core.naming import CONTROLNETS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

_ATTRIBUTES = (
    ("unet", "unet"),
    ("transformer", "transformer"),
    ("te1", "text_encoder"),
    ("te2", "text_encoder_2"),
)


def pipeline_components(pipe: Any) -> dict[str, nn.Module]:
    """Component → module, of those that any object with a pipeline's attributes has."""
    named = [(component, getattr(pipe, attribute, None)) for component, attribute in _ATTRIBUTES]
    named += zip(CONTROLNETS, _controlnets(pipe), strict=False)
    return {component: module for component, module in named if module is not None}


def _controlnets(pipe: Any) -> Sequence[nn.Module]:
    """Those of a pipeline: its only one, or the parts of diffusers' MultiControlNetModel."""
    controlnet = getattr(pipe, "controlnet", None)
    return [*getattr(controlnet, "nets", [controlnet])]


def denoisers(components: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The components that run in every step."""
    return {name: module for name, module in components.items() if not name.startswith("te")}


def step_callback(advance: Callable[[int, int], None]) -> Callable[..., dict[str, Any]]:
    """What a diffusers pipeline calls after each step (``callback_on_step_end``), so that strengths move in time.

    Args:
        advance: `LoraSession.advance`.
    """

    def on_step_end(pipe: Any, call: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        # Samplers of second order call the model twice in each step but the last.
        order = pipe.scheduler.order
        if call + 1 < pipe.num_timesteps:
            advance((call + 1) // order, (pipe.num_timesteps + order - 1) // order)
        return {}

    return on_step_end
