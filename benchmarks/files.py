"""Time of looking at a folder of 1,000 LoRA files: their headers read, and remembered by (path, size, time).

The files have the headers of C3Lier LoRAs of an SD1.5-shaped UNet with a trainer's metadata, and numbers that take no
room on the disk. What is read lies in the system's file cache, as it does from the second time on.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel

from benchmarks import synthetic
from benchmarks.common import Claim, Report, Table, lora_folder, parse_options, seconds
from benchmarks.timing import Case, Stopwatch, take_turns
from lib_lora.catalog import LoraCatalog
from lib_lora.core.files import read_header
from lib_lora.core.header import encode_header

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FILES = 1_000
FEW = 20
ROUNDS = 5
MOST_SECONDS = 1.0
TAGS = 1_000
"""Captions' tags that a trainer counts into the metadata: about 30 kB."""


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("files", __doc__.splitlines()[0], argv, ("fp16",))
    report = Report("files", options, "fp16", file=options.stem)
    count = FEW if options.out is None else FILES
    with lora_folder() as folder:
        header = _write_files(folder / "loras", count, options.model)
        cases = _cases(folder)
        take_turns(cases, options.rounds(ROUNDS), Stopwatch(torch.device("cpu")))
    rows = [(case.name, seconds(case.wall), seconds(case.busy)) for case in cases]
    notes = (f"medians; {count:,} files with headers of {header / 1e3:.0f} kB",)
    claims = [Claim(f"{case.name}: seconds", case.wall, MOST_SECONDS) for case in cases[1:]]
    report.add(Table(f"{count:,} files", ("what", "time", "CPU time"), rows, notes), claims)
    report.save()
    return 0


def _write_files(folder: Path, count: int, model: str) -> int:
    """Files that differ in their metadata only; returns the bytes of a header."""
    folder.mkdir()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**synthetic.MODELS[model])
    first = synthetic.write_lora(folder / "first.safetensors", synthetic.target_layers(unet, "C3Lier"))
    layout = read_header(first).tensors
    size = max(info.end for info in layout.values())
    first.unlink()
    tags = json.dumps({"img": {f"tag number {number}": number for number in range(TAGS)}})
    header = b""
    for number in range(count):
        metadata = {"ss_output_name": f"lora {number}", "ss_tag_frequency": tags, "sshs_model_hash": f"{number:064x}"}
        header = encode_header(layout, metadata)
        with (folder / f"{number:04}.safetensors").open("wb") as file:
            file.write(header)
            os.truncate(file.fileno(), len(header) + size)
    return len(header)


def _cases(folder: Path) -> list[Case]:
    """Without an index, after a restart with one, and in a catalog that knows all of it."""
    loras, index = folder / "loras", folder / "index.sqlite"
    LoraCatalog([loras], index).refresh()
    known = LoraCatalog([loras], index)
    known.refresh()
    return [
        Case("first look, every header is read", lambda: LoraCatalog([loras]).refresh()),
        Case("first look after a restart, with the index", lambda: LoraCatalog([loras], index).refresh()),
        Case("a further look", known.refresh),
    ]


if __name__ == "__main__":
    sys.exit(main())
