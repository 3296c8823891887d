"""Parameter groups for optimizers: rates of components and blocks, and LoRA+.

Sources: kohya's prepare_optimizer_params (networks/lora.py of sd-scripts); Hayou et al. 2024 (LoRA+, arXiv 2402.12354).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lib_lora.train.adapters import LoraLayer
    from lib_lora.train.block_lr import BlockLayout
    from lib_lora.train.network_options import NetworkOptions


TEXT_GROUP = "textencoder"
"""How names of the text encoders' groups begin."""


class Rates(NamedTuple):
    """Learning rates; None stands for `default`.

    Attributes:
        unet: Of the UNet's layers.
        text_encoder: Of the text encoders' layers.
        default: Of what has none of its own.
    """

    unet: float | None
    text_encoder: float | None
    default: float | None

    def of(self, component: str) -> float:
        """Of a component's layers."""
        own = self.unet if component == "unet" else self.text_encoder
        return (self.default if own is None else own) or 0.0


def parameter_groups(
    layers: Iterable[LoraLayer], rates: Rates, options: NetworkOptions, layout: BlockLayout
) -> list[dict[str, Any]]:
    """``params``, ``lr`` and ``name`` of each group, named as kohya names them.

    A group whose rate is 0 is left out; its layers are saved as they are.

    Args:
        layers: What is trained.
        rates: Learning rates.
        options: Factors of blocks, and of up factors (LoRA+).
        layout: The UNet's blocks.
    """
    layers = list(layers)
    every = options.loraplus_lr_ratio
    encoders = [layer for layer in layers if layer.component != "unet"]
    ratio = options.loraplus_text_encoder_lr_ratio or every
    groups = list(_split(TEXT_GROUP, encoders, rates.of("te1"), ratio))
    ratio = options.loraplus_unet_lr_ratio or every
    for name, part, weight in _unet_parts(layers, options, layout):
        groups += _split(name, part, rates.of("unet") * weight, ratio)
    return groups


def _unet_parts(
    layers: Iterable[LoraLayer], options: NetworkOptions, layout: BlockLayout
) -> Iterator[tuple[str, list[LoraLayer], float]]:
    """Name, layers and factor of the rate: of the UNet, or of its blocks if their rates differ."""
    own = [layer for layer in layers if layer.component == "unet"]
    weights = options.lr_weights(layout)
    if weights is None:
        yield "unet", own, 1.0
        return
    for block in dict.fromkeys(layer.block for layer in own):
        weight = weights.blocks[block] if block >= 0 else 1.0
        yield f"unet_block{block}", [layer for layer in own if layer.block == block], weight


def _split(name: str, layers: Iterable[LoraLayer], rate: float, ratio: float | None) -> Iterator[dict[str, Any]]:
    """One group, or with LoRA+ one of the down factors and one of the up factors."""
    layers = list(layers)
    downs = [layer.lora_down.weight for layer in layers]
    ups = [layer.lora_up.weight for layer in layers]
    if not downs or not rate:
        return
    if ratio is None:
        yield {"name": name, "lr": rate, "params": [*downs, *ups]}
    else:
        yield {"name": name, "lr": rate, "params": downs}
        yield {"name": f"{name} plus", "lr": rate * ratio, "params": ups}
