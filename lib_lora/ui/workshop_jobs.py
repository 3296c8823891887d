"""The workshop's jobs as forms; what each asks for is what its command asks for."""

from __future__ import annotations

from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.models import BaseModel
from lib_lora.hosts.standalone.vocabulary import tokenizer_files
from lib_lora.prompt.tags import parse_prompt
from lib_lora.tools.combine import METHODS, combine
from lib_lora.tools.convert import convert_lora
from lib_lora.tools.convert_checkpoint import to_diffusers, to_single
from lib_lora.tools.dylora import split_dylora
from lib_lora.tools.extract import MIN_DIFF, extract
from lib_lora.tools.merge import PRECISIONS, merge_loras
from lib_lora.tools.ranks import RankRule
from lib_lora.tools.resize import resize
from lib_lora.ui.workshop_forms import NONE, Field, Form

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lib_lora.hosts.host import Host
    from lib_lora.tools.given import GivenLora
    from lib_lora.tools.outcome import Outcome
    from lib_lora.ui.workshop_forms import Values


def devices() -> tuple[str, ...]:
    """Where can be calculated here."""
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ("cpu", *found, *(["mps"] if torch.backends.mps.is_available() else []))


def _merge(host: Host, model: Path, loras: Sequence[GivenLora], out: Path, **options: Any) -> Outcome:
    return merge_loras(model, loras, out, presets=host.presets, **options)


def _combine(_: Host, loras: Sequence[GivenLora], out: Path, dtype: str | None, **given: Any) -> Outcome:
    rule = _rule(given) if given["method"] == "svd" else None
    return combine(loras, out, rule=rule, dtype=_dtype(dtype), **given)


def _extract(_: Host, base: Path, tuned: Path, out: Path, dtype: str | None, **given: Any) -> Outcome:
    zero_is_none = {name: given.pop(name) or None for name in ("conv_rank", "clamp")}
    return extract(base, tuned, out, dtype=_dtype(dtype), **zero_is_none, **given)


def _resize(_: Host, lora: Path, out: Path, dtype: str | None, **given: Any) -> Outcome:
    return resize(lora, out, _rule(given), dtype=_dtype(dtype), **given)


def _rule(given: dict[str, Any]) -> RankRule:
    """The ranks; their answers are taken out of `given`."""
    rank, conv_rank, dynamic = (given.pop(name) for name in ("rank", "conv_rank", "dynamic"))
    return RankRule(rank, conv_rank or None, dynamic, given.pop("parameter", None), given.pop("kohya", False))


def _dtype(name: str | None) -> torch.dtype | None:
    return PRECISIONS[name] if name else None


def _split(_: Host, lora: Path, out: Path, unit: int, **options: Any) -> Outcome:
    return split_dylora(lora, out, unit, **options)


def _convert_lora(_: Host, lora: Path, out: Path, to: Any, family: str | None, **options: Any) -> Outcome:
    return convert_lora(lora, to, out, family=BaseModel[family] if family else None, **options)


def _convert_model(_: Host, model: Path, out: Path, to: str, *, overwrite: bool, **options: Any) -> Outcome:
    if to == "single":
        return to_single(model, out, overwrite=overwrite, **options)
    return to_diffusers(model, out, tokenizer=partial(tokenizer_files, None), **options)


def _loras_named(values: Values) -> str:
    return "-".join(PurePath(one.name).name for one in parse_prompt(str(values["loras"] or "")).requests)


def _merged_name(values: Values) -> str:
    loras = _loras_named(values)
    return f"{values['model']}-{loras}" if values["model"] and loras else ""


def _named_after(source: str, ending: str) -> Callable[[Values], str]:
    """Suggests what stands in the field `source`, and an ending with the values of other fields in ``{}``."""
    return lambda values: f"{values[source]}{ending.format(**values)}" if values[source] else ""


_TYPES = (NONE, *PRECISIONS)
_DYNAMIC = ("sv_ratio", "sv_fro", "sv_cumulative")
_SVD, _CHOSEN = {"method": ("svd",)}, {"dynamic": _DYNAMIC}
_SINGLE, _FOLDER = {"to": ("single",)}, {"to": ("diffusers",)}
_LORA, _LORAS, _DTYPE = Field("lora", "lora"), Field("loras", "tags"), Field("dtype", "options", NONE, _TYPES)
_DEVICE = Field("device", "options", "cpu", devices())

FORMS = (
    Form(
        "merge",
        "model",
        (
            Field("model", "model"),
            _LORAS,
            Field("precision", "options", "float", (*PRECISIONS,)),
            Field("save_precision", "options", NONE, _TYPES),
            _DEVICE,
            Field("hashed", "tick", value=False),
        ),
        _merge,
        _merged_name,
        is_folder=lambda given: given["model"].is_dir(),
    ),
    Form(
        "combine",
        "lora",
        (
            _LORAS,
            Field("method", "options", "concat", METHODS),
            Field("rank", "whole", 32, when=_SVD),
            Field("conv_rank", "whole", 0, when=_SVD),
            Field("dynamic", "options", NONE, (NONE, *_DYNAMIC), when=_SVD),
            Field("parameter", "number", 0.9, when=_SVD | _CHOSEN),
            _DTYPE,
        ),
        _combine,
        _loras_named,
    ),
    Form(
        "extract",
        "lora",
        (
            Field("base", "model"),
            Field("tuned", "model"),
            Field("rank", "whole", 32),
            Field("conv_rank", "whole", 0, words="extract.conv_rank"),
            Field("clamp", "number", 0),
            Field("min_diff", "number", MIN_DIFF),
            Field("dtype", "options", "float", (*PRECISIONS,), words="extract.dtype"),
            _DEVICE,
        ),
        _extract,
        _named_after("tuned", "-r{rank}"),
    ),
    Form(
        "resize",
        "lora",
        (
            _LORA,
            Field("rank", "whole", 16),
            Field("conv_rank", "whole", 0),
            Field("dynamic", "options", NONE, (NONE, *_DYNAMIC)),
            Field("parameter", "number", 0.9, when=_CHOSEN),
            Field("kohya", "tick", value=False),
            _DTYPE,
        ),
        _resize,
        _named_after("lora", "-r{rank}"),
    ),
    Form("split", "lora", (_LORA, Field("unit", "whole", 4)), _split, _named_after("lora", "-rank")),
    Form(
        "convert_lora",
        "lora",
        (
            _LORA,
            Field("to", "options", "kohya", ("kohya", "peft"), words="convert_lora.to"),
            Field("family", "options", NONE, (NONE, "SD1", "SD2", "SDXL")),
        ),
        _convert_lora,
        _named_after("lora", "-{to}"),
    ),
    Form(
        "convert_model",
        "model",
        (
            Field("model", "model"),
            Field("to", "options", "single", ("single", "diffusers"), words="convert_model.to"),
            Field("variant", "text", "", when=_SINGLE),
            Field("config", "model", NONE, when=_FOLDER),
            Field("prediction", "options", NONE, (NONE, "epsilon", "v"), when=_FOLDER),
        ),
        _convert_model,
        _named_after("model", "-{to}"),
        is_folder=lambda given: given["to"] == "diffusers",
    ),
)
