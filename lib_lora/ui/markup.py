"""HTML that the page shows. Every text goes through `escape`, wherever it comes from."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lib_lora.hosts.host import Picture
    from lib_lora.report import SessionReport
    from lib_lora.ui.jobs import JobState
    from lib_lora.ui.texts import Texts

MINUTE = 60
FEW_SECONDS = 10


def job_status(texts: Texts, state: JobState[Any]) -> str:
    """A bar and a line about how far a job is."""
    words = escape(_words(texts, state))
    if state.phase == "running":
        value = f' value="{state.done}" max="{state.total}"' if state.total else ""
        return f'<div class="prefuse-job" role="status"><progress{value}></progress><span>{words}</span></div>'
    return f'<div class="prefuse-job prefuse-{state.phase}" role="status"><span>{words}</span></div>'


def message(text: str, kind: str = "note") -> str:
    """A line; `kind` is ``note`` or ``refused``."""
    return f'<div class="prefuse-{escape(kind)}" role="status">{escape(text)}</div>' if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="prefuse-table"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(rows: Iterable[tuple[object, object]]) -> str:
    """Names and what they are."""
    body = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return f'<div class="prefuse-table"><table class="prefuse-pairs"><tbody>{body}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    """HTML that is shown when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def copyable(texts: Texts, text: str) -> str:
    """A text and a button that copies it."""
    title, words = escape(texts("page.copy.hint")), escape(texts("page.copy"))
    button = f'<button type="button" class="prefuse-copy" title="{title}" data-text="{escape(text)}">{words}</button>'
    return f'<div class="prefuse-copyable"><code>{escape(text)}</code>{button}</div>'


def report_lines(report: SessionReport) -> str:
    """What the LoRAs of a picture did, line by line."""
    kinds = {"+": "applied", "-": "refused", "!": "note"}
    lines = str(report).splitlines()
    items = "".join(f'<li class="prefuse-{kinds.get(line[:1], "line")}">{escape(line)}</li>' for line in lines)
    return f'<ul class="prefuse-report">{items}</ul>'


def picture_report(texts: Texts, seed: int, picture: Picture) -> str:
    """What the LoRAs of a picture did, and how it can be drawn again."""
    said = report_lines(picture.report) + copyable(texts, picture.infotext)
    return f'<section class="prefuse-picture"><h4>{escape(texts("generate.picture", seed=seed))}</h4>{said}</section>'


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    if seconds < MINUTE:
        return f"{seconds:.{0 if seconds >= FEW_SECONDS else 1}f} s"
    minutes, rest = divmod(round(seconds), MINUTE)
    return f"{minutes} min {rest} s"


def _words(texts: Texts, state: JobState[Any]) -> str:
    if state.phase == "waiting":
        return texts("job.waiting", ahead=state.ahead)
    if state.phase == "refused":
        return state.reason
    if state.phase != "running":
        return texts(f"job.{state.phase}", seconds=duration(state.seconds))
    left = state.seconds_left
    if left is None:
        return texts("job.running", seconds=duration(state.seconds))
    percent = f"{100 * state.done / state.total:.0f}"
    return texts("job.left", percent=percent, seconds=duration(state.seconds), left=duration(left))
