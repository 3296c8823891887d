"""LoRA + LoRA → LoRA: their exact sum, its best approximation at a smaller rank, or kohya's sum of factors.

The exact sum is not what ``--concat`` of kohya's scripts makes: they keep the first file's alpha beside the sum of the
ranks, so that the effect is weaker than that of the LoRAs together. Here alpha is the rank, and every strength and
scale is in the factors.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from lib_lora import __version__
from lib_lora.core.adapters import Factors, is_low_rank
from lib_lora.core.adapters.base import matrix, norm
from lib_lora.core.files import data_sha256
from lib_lora.core.norms import factors_norm
from lib_lora.core.saving import check_output, no_progress, save_tensors
from lib_lora.errors import AdapterError, JobError
from lib_lora.tools.factored import (
    Truncation,
    balanced,
    check_finite,
    distance,
    exact_factors,
    stacked,
    stored,
    truncated,
)
from lib_lora.tools.gather import gather
from lib_lora.tools.metadata import lora_metadata
from lib_lora.tools.outcome import LayerOutcome, LoraOutcome, dtype_name
from lib_lora.tools.recipe import RECIPE_KEY
from lib_lora.tools.svd import truncated_dense

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.saving import Progress
    from lib_lora.tools.gather import GatheredLoras, LayerTerm, SharedLayer
    from lib_lora.tools.given import GivenLora
    from lib_lora.tools.ranks import RankRule

Method: TypeAlias = Literal["concat", "svd", "add"]
METHODS: tuple[Method, ...] = get_args(Method)

ADD_NOTE = "add sums up and down apart, as kohya's merge_lora does: no sum of effects, the errors tell how far from it"
_KEPT = ("ss_base_model_version", "ss_v2", "modelspec.prediction_type")
"""Metadata of the first file that has it; all other training metadata is that of one of many trainings."""


def combine(
    loras: Sequence[GivenLora],
    out: Path,
    *,
    method: Method = "concat",
    rule: RankRule | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> LoraOutcome:
    """Write one LoRA that does what several do together, in kohya's layout.

    ``concat`` is the exact sum of all strength · ΔW: the ranks add up, alpha is the rank. ``svd`` is the best
    approximation of that sum. ``add`` sums `up` and `down` apart, as kohya's merge_lora.py does, for its results.

    Args:
        loras: Files with strengths of either sign.
        out: The file to be.
        method: See above.
        rule: Ranks for ``svd``, and for it alone.
        dtype: Of all tensors; None for the narrowest that holds the numbers of all files.
        overwrite: Whether an older file is replaced.
        progress: Told the layers done.

    Raises:
        FileError: If a file can not be read or written.
        PrefuseError: If a LoRA is not good or they do not fit together (see `gather`), or the method is none for them.
    """
    if (rule is not None) != (method == "svd"):
        raise JobError(f"a rank belongs to the method svd and to no other, the method is {method}")
    check_output(out, overwrite=overwrite)
    gathered = gather(loras)
    dtype = dtype or gathered.dtype
    check_output(out, dtype.itemsize * sum(_numbers(layer, rule) for layer in gathered.layers), overwrite=overwrite)
    tensors: dict[str, Tensor] = {}
    outcomes: list[LayerOutcome] = []
    for done, layer in enumerate(gathered.layers, 1):
        new, outcome = _combined(layer, method, rule, dtype)
        tensors |= new
        outcomes.append(outcome)
        progress(done, len(gathered.layers))
    metadata = _metadata(gathered, tensors, out) | {RECIPE_KEY: _recipe(loras, method, rule)}
    save_tensors(out, tensors, metadata, overwrite=overwrite)
    notes = gathered.notes() + ((ADD_NOTE,) if method == "add" else ())
    return LoraOutcome(out, out.stat().st_size, gathered.family.value, dtype_name([dtype]), tuple(outcomes), notes)


def _numbers(layer: SharedLayer, rule: RankRule | None) -> int:
    """About how many the factors of a layer will have."""
    return sum(layer.sides) * (min(rule.largest(layer.shape), layer.rank) if rule else layer.rank)


def _combined(
    layer: SharedLayer, method: Method, rule: RankRule | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], LayerOutcome]:
    """A layer's tensors by kohya's keys, and what became of it."""
    alpha = None
    try:
        if rule is not None:
            made = _svd(layer, rule)
        elif method == "add":
            made, alpha = _add(layer)
        else:
            made = _concat(layer)
        low = made.factors if method == "add" else balanced(made.factors)
        kept = stored(low, dtype, alpha)
        check_finite(layer.key, kept)
    except AdapterError as error:
        raise AdapterError(f"layer {layer.key}: {error}") from error
    error = math.hypot(made.lost, distance(low, kept.factors()))
    return kept.tensors(layer.key, layer.shape), LayerOutcome(layer.key, layer.rank, kept.rank, made.norm, error)


def _concat(layer: SharedLayer) -> Truncation:
    """Σ strength · ΔW as it is: the factors side by side."""
    whole = stacked([(_thin_factors(term), term.factor) for term in layer.terms])
    return Truncation(whole, factors_norm(whole), 0.0)


def _thin_factors(term: LayerTerm) -> Factors:
    low = exact_factors(term.adapter)
    if low is None or (low.up.shape[1] > min(low.up.shape[0], low.down.shape[1]) and not is_low_rank(term.adapter)):
        raise AdapterError(f"{term.source} has no thin factors there ({term.adapter.algorithm}); use svd")
    return low


def _svd(layer: SharedLayer, rule: RankRule) -> Truncation:
    """The best approximation of Σ strength · ΔW: from thin factors where all have some, else from ΔW itself."""
    terms = [(low, term.factor) for term in layer.terms if (low := exact_factors(term.adapter))]
    if len(terms) == len(layer.terms) and sum(low.up.shape[1] for low, _ in terms) <= min(layer.sides):
        return truncated(stacked(terms), lambda values: rule.of(values, layer.shape))
    whole = torch.zeros(layer.sides)
    for term in layer.terms:
        whole += term.factor * matrix(term.adapter.delta_weight(torch.empty(()).expand(layer.shape)))
    low = truncated_dense(whole, rule.largest(layer.shape))
    return Truncation(low, norm(whole), norm(whole - low.up @ low.down))


def _add(layer: SharedLayer) -> tuple[Truncation, float]:
    """Σ |s| · up and Σ s · down with s = strength · √(alpha / alpha of the first), and that alpha.

    Source: kohya's merge_lora.py.
    """
    lows = [_lora_factors(term) for term in layer.terms]
    ranks = {low.up.shape[1] for low in lows}
    if len(ranks) > 1:
        raise AdapterError(f"add needs equal ranks, these are {', '.join(map(str, sorted(ranks)))}; use concat or svd")
    rank = ranks.pop()
    first = lows[0].scale
    if any(low.scale * first <= 0 for low in lows):
        raise AdapterError("add needs alphas of one sign that are not 0; use concat or svd")
    scales = [term.factor * math.sqrt(low.scale / first) for term, low in zip(layer.terms, lows, strict=True)]
    up, down = torch.zeros_like(lows[0].up, dtype=torch.float32), torch.zeros_like(lows[0].down, dtype=torch.float32)
    for low, scale in zip(lows, scales, strict=True):
        up, down = up + low.up.float() * abs(scale), down + low.down.float() * scale
    whole = stacked([(low, term.factor) for term, low in zip(layer.terms, lows, strict=True)])
    added = Factors(up, down, first)
    return Truncation(added, factors_norm(whole), distance(whole, added)), first * rank


def _lora_factors(term: LayerTerm) -> Factors:
    if not is_low_rank(term.adapter):
        raise AdapterError(f"add is for LoRA, {term.source} has {term.adapter.algorithm} there; use concat or svd")
    return term.adapter.factors()


def _metadata(gathered: GatheredLoras, tensors: dict[str, Tensor], out: Path) -> dict[str, str]:
    said = [network.metadata for network in gathered.networks]
    base = {key: text for key in _KEPT if (text := next((one[key] for one in said if key in one), ""))}
    titles = [network.metadata.get("modelspec.title", network.name) for network in gathered.networks]
    return lora_metadata(tensors, base, family=gathered.family, title=out.stem, merged_from=titles)


def _recipe(loras: Sequence[GivenLora], method: Method, rule: RankRule | None) -> str:
    files = [
        {
            "file": lora.entry.path.name,
            "sha256": data_sha256(lora.entry.path),
            "te": lora.request.te,
            "unet": lora.request.unet,
            "tag": lora.request.raw,
        }
        for lora in loras
    ]
    recipe: dict[str, Any] = {"prefuse": __version__, "method": method, "loras": files}
    if rule is not None:
        recipe |= {"rank": rule.rank, "conv_rank": rule.conv_rank or rule.rank}
    return json.dumps(recipe, ensure_ascii=False)
