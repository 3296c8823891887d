"""The largest number of a base weight, where it has to be known before anything is added to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from lib_lora.core.base_store import BaseStore
    from lib_lora.core.layers import LayerRef

WIDE_PEAK = 1e6
"""Taken for max |W0| of types with float32's range, where reading it would tell nothing."""


class Peaks(dict[str, float]):
    """Layer key → max |W0|, read once, and only for types in which a sum of ordinary numbers can overflow."""

    def read(self, layers: Iterable[LayerRef], store: BaseStore) -> None:
        """Read those that are not known; each device is waited for once."""
        found: dict[torch.device, dict[str, Tensor]] = {}
        for layer in layers:
            if layer.key not in self:
                live = layer.live()
                if torch.finfo(live.dtype).max > 1e30:
                    self[layer.key] = WIDE_PEAK
                else:
                    found.setdefault(live.device, {})[layer.key] = store.get(layer, live).float().abs().amax()
        for peaks in found.values():
            for key, peak in zip(peaks, torch.stack([*peaks.values()]).cpu(), strict=True):
                self[key] = peak.item()
