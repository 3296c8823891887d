"""What a job of the workshop made, or would make, as HTML."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from lib_lora.tools.outcome import LoraOutcome
from lib_lora.ui.markup import folded, message, pairs, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lib_lora.tools.outcome import Outcome
    from lib_lora.ui.texts import Texts

MOST_ROWS = 12
MEGABYTE = 1e6
PLAIN = ("base_model", "dtype", "precision", "save_precision", "layout", "tensors")
"""What some kinds of outcome know, and is shown as it is."""


def outcome_panel(texts: Texts, outcome: Outcome) -> str:
    """Where it is, its size, its layers, its metadata, and what to note."""
    state = "written" if outcome.written else "preview"
    parts = [f'<h4 class="prefuse-{state}">{escape(texts(f"outcome.{state}"))}</h4>']
    parts += [message(note) for note in outcome.notes]
    parts.append(_facts(texts, outcome))
    if isinstance(outcome, LoraOutcome):
        parts.append(folded(texts("outcome.layers"), _layers(texts, outcome)))
    if outcome.metadata:
        parts.append(folded(texts("outcome.metadata", count=len(outcome.metadata)), _metadata(outcome)))
    return f'<div class="prefuse-outcome">{"".join(parts)}</div>'


def _facts(texts: Texts, outcome: Outcome) -> str:
    plain = outcome.to_dict()
    rows = [*_room(texts, outcome), *((texts(f"outcome.{key}"), plain[key]) for key in PLAIN if plain.get(key))]
    rows += [
        (texts("outcome.changed"), lora) for lora in _cut(texts, [str(lora) for lora in getattr(outcome, "loras", ())])
    ]
    rows += _counts(texts, outcome, plain)
    return pairs(rows)


def _room(texts: Texts, outcome: Outcome) -> Iterator[tuple[str, object]]:
    for path in _cut(texts, [str(path) for path in outcome.paths]):
        yield texts("outcome.path"), path
    yield texts("outcome.size"), _megabytes(texts, outcome.size, at_most=outcome.at_most)
    needed, free = (f"{size / MEGABYTE:,.1f}" for size in (outcome.disk.needed, outcome.disk.free))
    yield texts("outcome.disk"), texts("outcome.room", needed=needed, free=free)


def _megabytes(texts: Texts, size: int, *, at_most: bool) -> str:
    text = f"{size / MEGABYTE:,.2f} MB"
    return texts("outcome.at_most", what=text) if at_most else text


def _counts(texts: Texts, outcome: Outcome, plain: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    if isinstance(outcome, LoraOutcome):
        yield texts("outcome.layers"), len(outcome.layers)
        yield texts("outcome.ranks"), _counted(texts, outcome.ranks)
        yield texts("outcome.ranks_before"), _counted(texts, outcome.ranks_before)
        if outcome.written:
            yield texts("outcome.error"), f"{outcome.error:.2%}"
    elif "layers" in plain:
        if "rank" in plain:
            yield texts("outcome.rank_before"), plain["rank"]
        yield texts("outcome.layers"), plain["layers"]
    for name, count in plain.get("left_out", {}).items():
        yield texts("outcome.left_out"), f"{name} ({count})"


def _counted(texts: Texts, ranks: Mapping[int, int]) -> str:
    return ", ".join(_cut(texts, [texts("outcome.rank_of", rank=rank, count=count) for rank, count in ranks.items()]))


def _layers(texts: Texts, outcome: LoraOutcome) -> str:
    """The layers with the largest errors first, where these are known."""
    layers = sorted(outcome.layers, key=lambda layer: -layer.relative)
    head = [texts(f"outcome.{key}") for key in ("layer", "rank_before", "rank")]
    rows = [(layer.name, layer.rank_before, layer.rank) for layer in layers[:MOST_ROWS]]
    if outcome.written:
        head.append(texts("outcome.error"))
        rows = [(*row, f"{layer.relative:.2%}") for row, layer in zip(rows, layers, strict=False)]
    return table(head, rows) + message(_more(texts, len(layers)))


def _metadata(outcome: Outcome) -> str:
    return pairs((key, outcome.metadata[key]) for key in sorted(outcome.metadata))


def _cut(texts: Texts, lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = _more(texts, len(lines))
    return [*lines[:MOST_ROWS], *([more] if more else [])]


def _more(texts: Texts, count: int) -> str:
    return texts("outcome.more", count=count - MOST_ROWS) if count > MOST_ROWS else ""
