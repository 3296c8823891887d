"""What was found in a file, as HTML."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lora.catalog import SHORT_HASH_LETTERS
from lib_lora.hosts.guard import attempt, sentence
from lib_lora.tools.plots.bars import draw_tags
from lib_lora.tools.plots.file import draw_file
from lib_lora.ui.markup import copyable, folded, message, pairs, table
from lib_lora.ui.plot_words import plot_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lib_lora.tools.inspect import Fit, Inspection
    from lib_lora.tools.plots.style import Plot
    from lib_lora.tools.training import Training
    from lib_lora.ui.texts import Texts

MOST_LETTERS = 160
"""Of a text in a table."""
MOST_ROWS = 200
MOST_NAMES = 5
MOST_KINDS = 12
MEGABYTE = 1e6


def inspection_panel(texts: Texts, found: Inspection) -> str:
    """Everything, what matters most first.

    Args:
        texts: Words of the page.
        found: What any file told, or lied.
    """
    hashes = "".join(copyable(texts, text) for text in (found.sha256[:SHORT_HASH_LETTERS], found.sha256))
    facts = [
        message(found.problem or "", "refused"),
        pairs(_facts(texts, found)),
        f'<div class="prefuse-hashes"><b>{escape(texts("inspect.hash"))}</b>{hashes}</div>',
        *(message(note) for note in found.notes),
    ]
    metadata = folded(texts("inspect.metadata", count=len(found.metadata)), metadata_table(texts, found.metadata))
    plot = plot_panel(lambda: draw_file(found, plot_words(texts))) if found.layers else ""
    halves = _halves("".join(facts), plot) + _training(texts, found.training)
    return f'<div class="prefuse-inspection">{halves}{metadata}</div>'


def _halves(left: str, right: str) -> str:
    """Side by side where there is room."""
    return f'<div class="prefuse-halves"><div>{left}</div><div>{right}</div></div>'


def plot_panel(draw: Callable[[], Plot]) -> str:
    """A plot, or why there is none."""
    svg, error = attempt("a plot of the page", lambda: draw().svg())
    return f'<div class="prefuse-plot">{svg}</div>' if error is None else message(sentence(error), "refused")


def metadata_table(texts: Texts, metadata: Mapping[str, str]) -> str:
    """Keys and texts, long ones cut."""
    rows = [(cut(key), cut(metadata[key])) for key in sorted(metadata)[:MOST_ROWS]]
    more = len(metadata) - MOST_ROWS
    head = (texts("inspect.key"), texts("inspect.text"))
    return table(head, rows) + message(texts("inspect.more", count=more) if more > 0 else "")


def cut(text: str) -> str:
    """The beginning of a long text, and how long it is."""
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}… ({len(text):,})"


def _facts(texts: Texts, found: Inspection) -> Iterator[tuple[str, str]]:
    """Name and text of each fact that there is."""
    told = {
        "file": Path(found.path).name,
        "size": f"{found.size / MEGABYTE:,.2f} MB, {texts('inspect.tensors', count=found.tensors)}",
        "kind": texts(f"inspect.kind.{found.kind.lower()}"),
        "base_model": found.base_model or texts("inspect.unknown"),
        "base_model_from": found.base_model_from,
        "algorithms": _counted(layer.algorithm for layer in found.layers),
        "ranks": _counted(layer.rank for layer in found.layers),
        "alphas": _counted(f"{layer.alpha:g}" for layer in found.layers if layer.alpha is not None),
        "dtypes": _shown(found.dtypes),
        "layouts": _shown(found.layouts),
        "fit": _fit(texts, found.fit) if found.fit or not found.layers else texts("inspect.no_model"),
        "not_finite": _some(found.not_finite) or texts("inspect.all_finite"),
        "embeddings": _some(found.embeddings),
        "unused": _some(found.unused),
    }
    yield from ((texts(f"inspect.fact.{name}"), text) for name, text in told.items() if text)


def _fit(texts: Texts, fit: Fit | None) -> str:
    if fit is None:
        return ""
    if fit.problem:
        return fit.problem
    matched = texts("inspect.matched", matched=fit.matched, total=fit.total, model=fit.model)
    missing = [
        texts("inspect.missing", part=part, count=count, names=", ".join(first))
        for part, (count, first) in fit.missing.items()
    ]
    return " ".join([matched, *missing])


def _training(texts: Texts, training: Training) -> str:
    """What the metadata tells of the training; nothing if it does not."""
    facts = pairs((texts(f"training.{name}"), text) for name, text in training.facts.items()) if training.facts else ""
    folders = ""
    if training.folders:
        head = [texts(f"training.{name}") for name in ("folder", "pictures", "repeats")]
        rows = [(cut(one.name), _number(one.pictures), _number(one.repeats)) for one in training.folders[:MOST_ROWS]]
        folders = table(head, rows)
    tags = plot_panel(lambda: draw_tags(training.tags, words=plot_words(texts))) if training.tags else ""
    if not (facts or folders or tags):
        return ""
    return f"<h4>{escape(texts('inspect.training'))}</h4>{_halves(facts + folders, tags)}"


def _number(count: int | None) -> str:
    return "" if count is None else str(count)


def _counted(values: Iterator[Any]) -> str:
    return _shown(Counter(values))


def _shown(counts: Mapping[Any, int]) -> str:
    """The most frequent first, each with how often."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    parts = [f"{key} ({count})" if len(ordered) > 1 else f"{key}" for key, count in ordered[:MOST_KINDS]]
    return ", ".join([*parts, *(["…"] if len(ordered) > MOST_KINDS else [])])


def _some(names: Sequence[str]) -> str:
    more = ", …" if len(names) > MOST_NAMES else ""
    return f"{len(names)}: {', '.join(map(cut, names[:MOST_NAMES]))}{more}" if names else ""
