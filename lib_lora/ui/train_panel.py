"""What the sub-tab of trainings shows, as HTML."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from lib_lora.prompt.tags import writable_name
from lib_lora.tools.plots.losses import draw_losses
from lib_lora.train.control import Wish
from lib_lora.ui.inspection import plot_panel
from lib_lora.ui.markup import copyable, duration, folded, message, pairs, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lib_lora.train.data.report import DataReport
    from lib_lora.ui.texts import Texts
    from lib_lora.ui.train_run import Made, Preview, Watch

MOST_ROWS = 20
MEGABYTE, GIBIBYTE = 1e6, 2**30


def preview_panel(texts: Texts, found: Preview) -> str:
    """Folders, sizes, what is left out, how long it will be, and the configuration for the command line."""
    report = found.report
    parts = [f'<h4 class="prefuse-preview">{escape(texts("train.previewed"))}</h4>', pairs(_facts(texts, found))]
    head = [texts(f"train.{key}") for key in ("folder_name", "count", "repeats", "uncaptioned")]
    rows = [(one.name, one.pictures, one.repeats, one.without_caption) for one in report.folders]
    parts.append(table(head, rows[:MOST_ROWS]))
    if report.skipped:
        parts.append(f"<h4>{escape(texts('train.skipped', count=len(report.skipped)))}</h4>")
        parts.append(pairs((one.name, one.reason) for one in report.skipped[:MOST_ROWS]))
    parts += [message(note) for note in report.notes]
    if found.disk.needed > found.disk.free:
        parts.append(message(texts("train.short"), "refused"))
    parts.append(folded(texts("train.configuration"), copyable(texts, found.plan.toml())))
    return f'<div class="prefuse-outcome">{"".join(parts)}</div>'


def running_line(texts: Texts, watch: Watch) -> str:
    """Step, loss, rates, speed and memory; before the first step, what is done."""
    now = watch.now
    if now is None:
        return message(watch.phase.capitalize())
    rates = " / ".join(dict.fromkeys(f"{rate:.3g}" for rate in now.rates.values()))
    values = {"step": now.step, "steps": now.steps, "epoch": now.epoch, "loss": f"{now.mean_loss:.4f}", "rates": rates}
    values |= {"speed": f"{now.steps_per_second:.2f}", "memory": f"{now.memory_bytes / GIBIBYTE:.1f}"}
    waits = {Wish.PAUSE: "train.paused", Wish.STOP: "train.stopping"}
    more = message(texts(waits[watch.wish])) if watch.wish in waits else ""
    return message(texts("train.now", **values)) + more


def loss_panel(texts: Texts, watch: Watch) -> str:
    """The losses until now, drawn."""
    losses = list(watch.losses)
    return plot_panel(lambda: draw_losses(losses, watch.first, texts("train.losses"))) if losses else ""


def made_panel(texts: Texts, made: Made) -> str:
    """The tag to try it with, where it is, and what the training did."""
    outcome = made.outcome
    tag = copyable(texts, f"<lora:{writable_name(made.name)}:1>") if made.name else ""
    title = texts("train.saved" if outcome.stopped else "train.made")
    parts = [f'<h4 class="prefuse-written">{escape(title)}</h4>', tag]
    parts += [message(note) for note in outcome.notes]
    facts = [
        (texts("outcome.path"), made.path),
        (texts("train.steps"), texts("train.of", done=outcome.step, all=outcome.steps)),
        (texts("train.loss"), f"{outcome.loss:.4f}"),
        (texts("train.time"), duration(outcome.seconds)),
    ]
    facts += [(texts("train.left_out"), outcome.skipped)] if outcome.skipped else []
    facts += [(texts("train.state"), outcome.state)] if outcome.stopped and outcome.state else []
    return f'<div class="prefuse-outcome">{"".join(parts)}{pairs(facts)}</div>'


def _facts(texts: Texts, found: Preview) -> Iterator[tuple[str, object]]:
    report = found.report
    yield texts("train.in_epoch"), report.train_images
    if report.reg_images:
        yield texts("train.reg"), report.reg_images
    yield texts("train.buckets"), _buckets(texts, report)
    yield texts("train.steps"), texts("train.in_epochs", steps=found.steps, epochs=f"{found.epochs:.4g}")
    yield texts("outcome.path"), found.plan.target
    needed, free = (f"{size / MEGABYTE:,.1f}" for size in (found.disk.needed, found.disk.free))
    key = "train.room" if found.disk.needed else "train.free"
    yield texts("outcome.disk"), texts(key, needed=needed, free=free)


def _buckets(texts: Texts, report: DataReport) -> str:
    """The sizes, the most frequent first."""
    ordered = sorted(report.buckets, key=lambda one: -one.count)
    told = [f"{one.size} ({one.count})" for one in ordered[:MOST_ROWS]]
    more = len(ordered) - len(told)
    return ", ".join([*told, *([texts("outcome.more", count=more)] if more > 0 else [])])
