"""``inspect``: what a file is."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lora.cli.output import tell

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from lib_lora.tools.inspect import Fit, Inspection

NAMES_SHOWN = 5
METADATA_SHOWN = 200


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--model", type=Path, help="checkpoint or diffusers folder to lay the LoRA over")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw norms and ranks of a LoRA's blocks")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write how much each block's elements change")
    parser.add_argument("--force", action="store_true", help="replace an existing picture or table")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Say what a file is: base model, algorithm, ranks, alphas, norms per block, NaN, metadata."""
    from lib_lora.tools.inspect import inspect_file

    inspection = inspect_file(arguments.file, arguments.model)
    if arguments.plot:
        from lib_lora.tools.plots.file import save_plot

        save_plot(inspection, arguments.plot, overwrite=arguments.force)
    if arguments.csv:
        from lib_lora.tools.analyse import analyse_blocks
        from lib_lora.tools.table import save_csv

        save_csv(analyse_blocks(arguments.file, arguments.model).to_csv(), arguments.csv, overwrite=arguments.force)
    tell(inspection.to_dict(), _inspection_text(inspection), as_json=arguments.json)


def _inspection_text(found: Inspection) -> str:
    rows = {
        "file": f"{found.path}, {found.size / 1e6:.2f} MB, {found.tensors} tensors",
        "kind": f"{found.kind} for {found.base_model or 'an unknown model'}",
        "base model from": found.base_model_from,
        "hash": f"{found.sha256[:12]} (as in infotexts), {found.sha256}",
        "dtypes": _counts(found.dtypes),
        "layouts": _counts(found.layouts),
        "algorithms": _counts(Counter(layer.algorithm for layer in found.layers)),
        "ranks": _counts(Counter(layer.rank for layer in found.layers)),
        "alphas": _counts(Counter(f"{layer.alpha:g}" for layer in found.layers if layer.alpha is not None)),
        "norm by block": ", ".join(f"{block} {norm:.3g}" for block, norm in found.block_norms().items()),
        "share by block": ", ".join(f"{block} {share:.0%}" for block, share in found.block_shares().items()),
        "embeddings": ", ".join(found.embeddings),
        "on the model": _fit_text(found.fit),
        "NaN or infinity": _some(found.not_finite) or "none",
        "unused keys": _some(found.unused),
        "notes": "; ".join(found.notes),
        "problem": found.problem,
    }
    rows |= {f"metadata {key}": textwrap.shorten(value, METADATA_SHOWN) for key, value in found.metadata.items()}
    return "\n".join(f"{key:16} {value}" for key, value in rows.items() if value)


def _fit_text(fit: Fit | None) -> str:
    if fit is None:
        return ""
    missing = "; ".join(f"{part} lacks {count}: {', '.join(first)}" for part, (count, first) in fit.missing.items())
    return fit.problem or f"{fit.matched} of {fit.total} layers exist in this {fit.model} model {missing}".rstrip()


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{key} ({count})" for key, count in counts.items())


def _some(names: Sequence[str]) -> str:
    more = ", …" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)}: {', '.join(names[:NAMES_SHOWN])}{more}" if names else ""
