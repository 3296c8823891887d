"""LoRA + LoRA → LoRA: their exact sum, its best approximation at a smaller rank, or kohya's sum of factors.

The exact sum is not what ``--concat`` of kohya's scripts makes: they keep the first file's alpha beside the sum of the
ranks, so that the effect is weaker than that of the LoRAs together. Here alpha is the rank, and every strength and
scale is in the factors.
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch

from lib_lora import __version__
from lib_lora.core.adapters import Factors, is_low_rank
from lib_lora.core.adapters.base import matrix, norm
from lib_lora.core.files import data_sha256
from lib_lora.core.norms import factors_norm
from lib_lora.core.saving import FLOPS_PER_BYTE, check_output, no_progress, save_tensors
from lib_lora.errors import AdapterError, JobError
from lib_lora.tools.factored import (
    Truncation,
    balanced,
    check_finite,
    distance,
    exact_factors,
    exact_rank,
    stacked,
    stored,
    truncated,
    without_numbers,
)
from lib_lora.tools.gather import gather
from lib_lora.tools.metadata import lora_metadata
from lib_lora.tools.outcome import LayerOutcome, LoraOutcome, LoraResult, dtype_name
from lib_lora.tools.ranks import RANKS_AT_MOST
from lib_lora.tools.recipe import RECIPE_KEY
from lib_lora.tools.svd import truncated_dense
from lib_lora.tools.work import Work

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lib_lora.core.saving import Progress
    from lib_lora.tools.gather import GatheredLoras, LayerTerm, SharedLayer
    from lib_lora.tools.given import GivenLora
    from lib_lora.tools.ranks import RankRule

    _Made: TypeAlias = "tuple[Mapping[str, Tensor], LayerOutcome]"

Method: TypeAlias = Literal["concat", "svd", "add"]
METHODS: tuple[Method, ...] = get_args(Method)

ADD_NOTE = "add sums up and down apart, as kohya's merge_lora does: no sum of effects, the errors tell how far from it"
_PRODUCTS = 10
"""Of two thin factors' columns, in float32, that a layer takes in all."""
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
    preview: bool = False,
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
        preview: Whether all is checked, and nothing is calculated or written.
        progress: Told the work done, in about bytes.

    Raises:
        FileError: If a file can not be read or written.
        PrefuseError: If a LoRA is not good or they do not fit together (see `gather`), or the method is none for them.
    """
    if (rule is not None) != (method == "svd"):
        raise JobError(f"a rank belongs to the method svd and to no other, the method is {method}")
    check_output(out, overwrite=overwrite)
    work = Work(progress)
    gathered = gather(loras, work)
    job = _Job(gathered, out, method, rule, dtype or gathered.dtype, _recipe(loras, method, rule, work))
    planned = job.result([job.planned(layer) for layer in gathered.layers])
    disk = check_output(out, planned.size, overwrite=overwrite)
    if preview:
        return planned.outcome(disk, written=False)
    costs = [_cost(layer) for layer in gathered.layers]
    read = 2 * sum(lora.entry.identity.size for lora in loras)
    work.expect(read + sum(costs) + 2 * planned.size)
    work.add(read)
    made: list[_Made] = []
    for layer, cost in zip(gathered.layers, costs, strict=True):
        made.append(job.combined(layer))
        work.add(cost)
    result = job.result(made, work.stage(planned.size))
    save_tensors(out, result.tensors, result.metadata, overwrite=overwrite, progress=work.stage(planned.size))
    return result.outcome(disk, written=True)


class _Job(NamedTuple):
    """What `combine` was asked for. Its two ways to a layer, with numbers and without, come to the same result."""

    gathered: GatheredLoras
    out: Path
    method: Method
    rule: RankRule | None
    dtype: torch.dtype
    recipe: str

    def planned(self, layer: SharedLayer) -> _Made:
        """A layer without its numbers.

        Raises:
            AdapterError: If the method is none for it.
        """
        with _layer_told(layer):
            if self.rule is not None:
                kept = without_numbers(layer.sides, _svd_rank(layer, self.rule), self.dtype)
            elif self.method == "add":
                lows = _addable(layer)
                kept = without_numbers(layer.sides, lows[0].up.shape[1], self.dtype, scale=lows[0].scale)
            else:
                kept = without_numbers(layer.sides, sum(map(_thin_rank, layer.terms)), self.dtype)
        return kept.tensors(layer.key, layer.shape), LayerOutcome(layer.key, layer.rank, kept.rank)

    def combined(self, layer: SharedLayer) -> _Made:
        """A layer's tensors by kohya's keys, and what became of it."""
        alpha = None
        with _layer_told(layer):
            if self.rule is not None:
                made = _svd(layer, self.rule)
            elif self.method == "add":
                made, alpha = _add(layer)
            else:
                made = _concat(layer)
            low = made.factors if self.method == "add" else balanced(made.factors)
            kept = stored(low, self.dtype, alpha)
            check_finite(layer.key, kept)
        error = math.hypot(made.lost, distance(low, kept.factors()))
        return kept.tensors(layer.key, layer.shape), LayerOutcome(layer.key, layer.rank, kept.rank, made.norm, error)

    def result(self, made: Sequence[_Made], progress: Progress = no_progress) -> LoraResult:
        """The whole file; `progress` is told the bytes that are hashed."""
        tensors = {name: tensor for new, _ in made for name, tensor in new.items()}
        metadata = _metadata(self.gathered, tensors, self.out, progress) | {RECIPE_KEY: self.recipe}
        return LoraResult(
            path=self.out,
            tensors=tensors,
            metadata=metadata,
            base_model=self.gathered.family.value,
            dtype=dtype_name([self.dtype]),
            layers=tuple(outcome for _, outcome in made),
            notes=(*self.gathered.notes(), *((ADD_NOTE,) if self.method == "add" else ())),
            limit=RANKS_AT_MOST if self.rule and self.rule.depends_on_values else "",
        )


@contextmanager
def _layer_told(layer: SharedLayer) -> Generator[None]:
    """Faults that do not know their layer."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"layer {layer.key}: {error}") from error


def _cost(layer: SharedLayer) -> int:
    """Units of `Work`: products of thin factors with as many columns as the ranks together."""
    return _PRODUCTS * sum(layer.sides) * layer.rank**2 // FLOPS_PER_BYTE


def _concat(layer: SharedLayer) -> Truncation:
    """Σ strength · ΔW as it is: the factors side by side."""
    whole = stacked([(low, term.factor) for term in layer.terms if (low := exact_factors(term.adapter))])
    return Truncation(whole, factors_norm(whole), 0.0)


def _thin_rank(term: LayerTerm) -> int:
    rank, shape = exact_rank(term.adapter), term.adapter.shape
    if rank is None or (rank > min(shape[0], math.prod(shape[1:])) and not is_low_rank(term.adapter)):
        raise AdapterError(f"{term.source} has no thin factors there ({term.adapter.algorithm}); use svd")
    return rank


def _svd_rank(layer: SharedLayer, rule: RankRule) -> int:
    """The rank that `_svd` gives at most."""
    thin = _thin_sum(layer)
    return rule.most(layer.shape, thin) if thin else min(rule.largest(layer.shape), *layer.sides)


def _thin_sum(layer: SharedLayer) -> int:
    """The ranks together where all updates have thin factors that are fewer than the layer's sides, else 0."""
    ranks = [rank for term in layer.terms if (rank := exact_rank(term.adapter))]
    return sum(ranks) if len(ranks) == len(layer.terms) and sum(ranks) <= min(layer.sides) else 0


def _svd(layer: SharedLayer, rule: RankRule) -> Truncation:
    """The best approximation of Σ strength · ΔW: from thin factors where all have some, else from ΔW itself."""
    if _thin_sum(layer):
        terms = [(low, term.factor) for term in layer.terms if (low := exact_factors(term.adapter))]
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
    lows = _addable(layer)
    first, rank = lows[0].scale, lows[0].up.shape[1]
    scales = [term.factor * math.sqrt(low.scale / first) for term, low in zip(layer.terms, lows, strict=True)]
    up, down = torch.zeros_like(lows[0].up, dtype=torch.float32), torch.zeros_like(lows[0].down, dtype=torch.float32)
    for low, scale in zip(lows, scales, strict=True):
        up, down = up + low.up.float() * abs(scale), down + low.down.float() * scale
    whole = stacked([(low, term.factor) for term, low in zip(layer.terms, lows, strict=True)])
    added = Factors(up, down, first)
    return Truncation(added, factors_norm(whole), distance(whole, added)), first * rank


def _addable(layer: SharedLayer) -> list[Factors]:
    """Factors of one rank, with alphas of one sign."""
    lows = [_lora_factors(term) for term in layer.terms]
    ranks = {low.up.shape[1] for low in lows}
    if len(ranks) > 1:
        raise AdapterError(f"add needs equal ranks, these are {', '.join(map(str, sorted(ranks)))}; use concat or svd")
    if any(low.scale * lows[0].scale <= 0 for low in lows):
        raise AdapterError("add needs alphas of one sign that are not 0; use concat or svd")
    return lows


def _lora_factors(term: LayerTerm) -> Factors:
    if not is_low_rank(term.adapter):
        raise AdapterError(f"add is for LoRA, {term.source} has {term.adapter.algorithm} there; use concat or svd")
    return term.adapter.factors()


def _metadata(gathered: GatheredLoras, tensors: Mapping[str, Tensor], out: Path, progress: Progress) -> dict[str, str]:
    said = [network.metadata for network in gathered.networks]
    base = {key: text for key in _KEPT if (text := next((one[key] for one in said if key in one), ""))}
    titles = [network.metadata.get("modelspec.title", network.name) for network in gathered.networks]
    return lora_metadata(tensors, base, family=gathered.family, title=out.stem, merged_from=titles, progress=progress)


def _recipe(loras: Sequence[GivenLora], method: Method, rule: RankRule | None, work: Work) -> str:
    files: list[dict[str, Any]] = []
    for lora in loras:
        request, digest = lora.request, data_sha256(lora.entry.path)
        said = {"te": request.te, "unet": request.unet, "tag": request.raw}
        files.append({"file": lora.entry.path.name, "sha256": digest} | said)
        work.tick()
    recipe: dict[str, Any] = {"prefuse": __version__, "method": method, "loras": files}
    if rule is not None:
        recipe |= {"rank": rule.rank, "conv_rank": rule.conv_rank or rule.rank}
    return json.dumps(recipe, ensure_ascii=False)
