"""What an exported UNet takes: tensors by name, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from lib_lora.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Mapping

Tensors: TypeAlias = "Tensor | list[Tensor]"

PIXELS = 8
"""Of the picture, for one of the latent, in each direction."""
TOKENS = 77
PREFIX = "unet."
"""Before the model's own names of its weights."""
TIME_IDS = 6
"""Height and width of the original, top and left of the crop, height and width that are aimed at."""
STEPS = 1000.0
MOST_BATCH, MOST_TOKENS, MOST_COARSE = 63, 16 * TOKENS, 64
"""Up to which a dynamic graph can be called: pictures, tokens, numbers of the smallest block in each direction.

From 64 pictures on diffusers computes another way.
"""


@dataclass(frozen=True)
class UNetSize:
    """Sizes of one call.

    Attributes:
        batch: Latents in it.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        tokens: Of the prompt, in multiples of 77.
    """

    batch: int
    height: int
    width: int
    tokens: int = TOKENS

    def other(self, step: int) -> UNetSize:
        """One that differs in every number, as a dynamic graph has to take it; `step` in pixels."""
        return replace(
            self, batch=self.batch + 1, height=self.height + step, width=self.width + 2 * step, tokens=2 * self.tokens
        )


class ExportedUNet(nn.Module):
    """A diffusers UNet whose inputs are tensors with names, and whose output is one tensor.

    The weights are called ``unet.`` and what the model calls them.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        context: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        down: list[Tensor] | None = None,
        mid: Tensor | None = None,
    ) -> Tensor:
        """What the UNet predicts, in the shape of the latent (without what an inpainting model adds to that)."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(
            latent,
            timestep,
            context,
            added_cond_kwargs=added,
            down_block_additional_residuals=None if down is None else tuple(down),
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]


class UNetInputs:
    """The inputs of one UNet.

    Attributes:
        coarse: Pixels of the picture for one number in the smallest block, in each direction.
    """

    def __init__(self, unet: nn.Module, *, controlnet: bool) -> None:
        """Read its configuration.

        Args:
            unet: A diffusers UNet.
            controlnet: Whether it takes a ControlNet's residuals.
        """
        self._config: Any = unet.config
        weight = next(unet.parameters())
        self._dtype, self._device = weight.dtype, weight.device
        self._controlnet = controlnet
        self.coarse = PIXELS << (len(self._config.block_out_channels) - 1)

    def check(self, size: UNetSize, *, dynamic: bool) -> None:
        """Whether the UNet can be called with such sizes.

        Raises:
            JobError: If a side is no multiple of what the smallest block stands for, or too small for a dynamic graph.
        """
        if size.batch < 1 or min(size.height, size.width) < 1 or size.height % self.coarse or size.width % self.coarse:
            raise JobError(
                f"A batch of {size.batch} with {size.width} x {size.height} pixels can not be exported; "
                f"width and height must be multiples of {self.coarse}, and the batch 1 or more."
            )
        if dynamic and min(size.height, size.width) < 2 * self.coarse:
            raise JobError(
                f"{size.width} x {size.height} pixels are too few for a dynamic export, which starts at "
                f"{2 * self.coarse}: of a single number it can not be told that it may be several."
            )

    def shapes(self, size: UNetSize) -> dict[str, tuple[int, ...] | list[tuple[int, ...]]]:
        """Name → shape, or shapes of a list, in the order of `ExportedUNet.forward`."""
        config, batch = self._config, size.batch
        height, width = size.height // PIXELS, size.width // PIXELS
        shapes: dict[str, tuple[int, ...] | list[tuple[int, ...]]] = {
            "latent": (batch, config.in_channels, height, width),
            "timestep": (batch,),
            "context": (batch, size.tokens, config.cross_attention_dim),
        }
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
            shapes |= {"text_embeds": (batch, pooled), "time_ids": (batch, TIME_IDS)}
        if self._controlnet:
            levels = [(batch, channels, height >> level, width >> level) for channels, level in self._residuals()]
            shapes |= {"down": levels, "mid": levels[-1]}
        return shapes

    def random(self, size: UNetSize, seed: int) -> dict[str, Tensors]:
        """Inputs as a sampler could give them, of the UNet's dtype and on its device; the timestep in float32."""
        generator = torch.Generator().manual_seed(seed)
        scales = {"timestep": STEPS, "time_ids": STEPS, "down": 0.1, "mid": 0.1}

        def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
            make = torch.rand if name.startswith("time") else torch.randn
            numbers = make(shape, generator=generator) * scales.get(name, 1.0)
            return numbers.to(self._device, torch.float32 if name == "timestep" else self._dtype)

        return {
            name: [tensor(name, one) for one in shape] if isinstance(shape, list) else tensor(name, shape)
            for name, shape in self.shapes(size).items()
        }

    def dynamic(self) -> dict[str, Any]:
        """Name → dimensions that may differ from call to call, as torch.export asks for them."""
        from torch.export import Dim

        batch, tokens = Dim("batch", min=1, max=MOST_BATCH), Dim("tokens", min=1, max=MOST_TOKENS)
        rows, columns = Dim("rows", min=2, max=MOST_COARSE), Dim("columns", min=2, max=MOST_COARSE)

        def picture(level: int) -> dict[int, Any]:
            factor = self.coarse // PIXELS >> level
            return {0: batch, 2: rows * factor, 3: columns * factor} if factor > 1 else {0: batch, 2: rows, 3: columns}

        dims: dict[str, Any] = {"latent": picture(0), "context": {0: batch, 1: tokens}}
        if self._controlnet:
            levels = [level for _, level in self._residuals()]
            dims |= {"down": [picture(level) for level in levels], "mid": picture(levels[-1])}
        return {name: dims.get(name, {0: batch}) for name in self.shapes(UNetSize(1, self.coarse, self.coarse))}

    def _residuals(self) -> list[tuple[int, int]]:
        """(channels, halvings) of what each part of the way down gives to the way up."""
        channels = self._config.block_out_channels
        layers = self._config.layers_per_block
        counts = [layers] * len(channels) if isinstance(layers, int) else layers
        found = [(channels[0], 0)]
        for level, (width, count) in enumerate(zip(channels, counts, strict=True)):
            found += [(width, level)] * count
            found += [(width, level + 1)] * (level + 1 < len(channels))
        return found


def described(shapes: Mapping[str, tuple[int, ...] | list[tuple[int, ...]]]) -> dict[str, str]:
    """Shapes for people; a list by its length, first and last."""
    return {
        name: f"{len(shape)} of {shape[0]} … {shape[-1]}" if isinstance(shape, list) else str(shape)
        for name, shape in shapes.items()
    }
