"""PEFT's settings in the header of a file that diffusers saves: ranks and alphas of layers, by their names.

Source: ``lora_adapter_metadata`` of diffusers >= 0.34, a JSON text with ``lora_alpha``, ``r``, ``use_rslora``,
``alpha_pattern`` and ``rank_pattern``, each behind ``unet.``, ``text_encoder.``, … in a file of several components.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lib_lora.core.naming import PIPELINE_PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping

PEFT_SETTINGS = "lora_adapter_metadata"
"""The header's key."""


class Rank(NamedTuple):
    """Rank and alpha of one layer; PEFT scales its update by alpha / rank."""

    rank: int
    alpha: float


class PeftAlphas:
    """Alphas of files whose layers have none, for diffusers keeps them in the header."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            settings: Any = json.loads(metadata.get(PEFT_SETTINGS, "{}"))
        except (ValueError, RecursionError):
            settings = {}
        self._settings = cast("dict[str, Any]", settings) if isinstance(settings, dict) else {}
        self._patterns: dict[tuple[str, str], dict[str, Any]] = {}

    def of(self, layer: str) -> float | None:
        """Alpha for one layer such that alpha / rank is PEFT's scaling, or None where nothing is said."""
        component, _, path = layer.partition(":")
        prefix = PIPELINE_PARTS.get(component, component)
        alpha = self._number(prefix, "lora_alpha", path, "alpha_pattern")
        if alpha is None or not self._setting(prefix, "use_rslora"):
            return alpha
        rank = self._number(prefix, "r", path, "rank_pattern")
        return None if rank is None else alpha * math.sqrt(rank)

    def _setting(self, prefix: str, key: str) -> Any:
        return self._settings.get(f"{prefix}.{key}", self._settings.get(key))

    def _number(self, prefix: str, key: str, path: str, pattern_key: str) -> float | None:
        patterns = self._flat_patterns(prefix, pattern_key)
        pattern = path if path in patterns else next(filter(path.endswith, patterns), "")
        value = patterns.get(pattern, self._setting(prefix, key))
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    def _flat_patterns(self, prefix: str, key: str) -> dict[str, Any]:
        """Ends of flat paths → number; the first that fits counts."""
        if (prefix, key) not in self._patterns:
            given = self._setting(prefix, key)
            patterns = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
            flat = {pattern.replace(".", "_").lstrip("^"): number for pattern, number in patterns.items()}
            self._patterns[prefix, key] = flat
        return self._patterns[prefix, key]


def peft_settings(layers: Mapping[str, Rank]) -> str:
    """The JSON text that says how each layer of a file in PEFT's layout is scaled.

    Args:
        layers: Layer's name as in `lora_names.peft_name` → its rank, not 0, and its alpha, finite.
    """
    parts: dict[str, dict[str, Rank]] = {}
    for name, rank in layers.items():
        part, _, path = name.partition(".")
        # CLIPTextModel of transformers 5 has no text_model; a name without it means the layer in both.
        parts.setdefault(part, {})[path.removeprefix("text_model.")] = rank
    settings = {f"{part}.{key}": value for part, ranks in parts.items() for key, value in _settings(ranks).items()}
    return json.dumps(settings, sort_keys=True)


def _settings(ranks: Mapping[str, Rank]) -> dict[str, Any]:
    """PEFT's LoraConfig of one component: the most frequent rank and alpha, and the layers that differ."""
    usual = Rank(*(Counter(numbers).most_common(1)[0][0] for numbers in zip(*ranks.values(), strict=True)))
    return {
        "peft_type": "LORA",
        "r": usual.rank,
        "lora_alpha": usual.alpha,
        "rank_pattern": {path: rank.rank for path, rank in ranks.items() if rank.rank != usual.rank},
        "alpha_pattern": {path: rank.alpha for path, rank in ranks.items() if rank.alpha != usual.alpha},
        "target_modules": sorted(ranks),
    }
