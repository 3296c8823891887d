"""What a picture's infotext, the API's answer and the page say about its LoRAs."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib_lora.catalog import infotext_name
from lib_lora.hosts.webui.settings import COMPAT_FIELD, option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lib_lora.hosts.webui.settings import Settings
    from lib_lora.report import SessionReport

HASHES_FIELD = "Lora hashes"
FILES_FIELD = "Lora files"
RESOLVED_FIELD = "Lora resolved"
"""Tags with presets and drawn block weights written out, where they say more than those of the prompt."""
STATUS_FIELD = "Prefuse"


class AnswerOnly(list[Any]):
    """A list that is in the API's answer and in the page's generation data, and not in the infotext.

    The WebUI takes of a list of the generation parameters the item of each picture, and leaves out what is None.
    """

    def __getitem__(self, index: Any) -> None:
        """None, for any picture."""
        return


def write_infotext(p: Any, report: SessionReport, hashes: Mapping[str, str], settings: Settings) -> None:
    """Fields of the LoRAs that were applied, and of them alone.

    Args:
        p: The generation.
        report: What was applied.
        hashes: Name in the prompt → short hash.
        settings: How it was applied.
    """
    if option("lora_add_hashes_to_infotext", True):
        if not getattr(p, "is_hr_pass", False) or not hasattr(p, "lora_hashes"):
            p.lora_hashes = {}
        p.lora_hashes.update({infotext_name(name): value for name, value in hashes.items() if value})
        _put(p, HASHES_FIELD, ", ".join(f"{name}: {value}" for name, value in p.lora_hashes.items()))
    renamed = {lora.name: lora.path.stem for lora in report.applied if lora.path.stem != lora.name}
    _put(p, FILES_FIELD, ", ".join(f"{infotext_name(name)}: {infotext_name(file)}" for name, file in renamed.items()))
    known = p.extra_generation_params.get(RESOLVED_FIELD, "") if getattr(p, "is_hr_pass", False) else ""
    resolved = [lora.resolved for lora in report.applied if lora.resolved and lora.resolved not in known]
    _put(p, RESOLVED_FIELD, " ".join([known, *resolved]).strip())
    _put(p, COMPAT_FIELD, settings.compat if report.applied and settings.compat != "exact" else "")


def write_status(p: Any, report: SessionReport, part: str) -> None:
    """The report of one pass for the page and the API: what is applied, what is refused, how long it took.

    Args:
        p: The generation.
        report: What was done.
        part: ``first``, ``hires`` or ``refiner``.
    """
    known = p.extra_generation_params.get(STATUS_FIELD)
    entries = {entry["pass"]: entry for entry in known} if isinstance(known, AnswerOnly) else {}
    if part == "first" and not getattr(p, "iteration", 0):
        entries = {}
    entry = _status(report, part)
    before = entries.get(part)
    if before is not None and not entry["layers"]:
        entry |= {"milliseconds": before["milliseconds"], "layers": before["layers"]}  # the first batch did the work
    entries[part] = entry
    p.extra_generation_params[STATUS_FIELD] = AnswerOnly(entries.values())
    if not any(entry["applied"] or entry["refused"] for entry in entries.values()):
        del p.extra_generation_params[STATUS_FIELD]


def _status(report: SessionReport, part: str) -> dict[str, Any]:
    return {
        "pass": part,
        "applied": [
            {key: getattr(lora, key) for key in ("name", "te", "unet", "weights", "schedule", "moving")}
            for lora in report.applied
        ],
        "refused": [{"name": refused.name, "reason": refused.reason} for refused in report.refused],
        "notes": list(report.notes),
        "milliseconds": round(report.milliseconds, 1),
        "layers": report.layers_written + report.layers_restored,
        "mode": report.mode,
    }


def _put(p: Any, field: str, value: str) -> None:
    if value:
        p.extra_generation_params[field] = value
    else:
        p.extra_generation_params.pop(field, None)
