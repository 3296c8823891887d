"""The parts of a model that are compiled one by one.

ControlNet and other code call a UNet's blocks themselves, past the UNet's own forward, so what is compiled is each
block where it stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCKS = (
    *("down_blocks", "mid_block", "up_blocks"),  # diffusers, ControlNet too
    *("input_blocks", "middle_block", "output_blocks"),  # LDM
    *("transformer_blocks", "single_transformer_blocks"),  # diffusers' transformers
)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name → block, as the model lists them; empty if it has none that we know."""
    return dict(_blocks(model))


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if name in BLOCKS and isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{number}", block) for number, block in child.named_children())
        elif name in BLOCKS:
            yield name, child
