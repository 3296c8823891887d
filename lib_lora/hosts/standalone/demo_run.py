"""The demo: pictures of the embedded model with and without LoRAs in a grid, then what the LoRAs cost."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lib_lora.core.saving import save_bytes
from lib_lora.hosts.host import GenerateRequest
from lib_lora.hosts.standalone.demo import LORA_DIR
from lib_lora.hosts.standalone.generate import generate
from lib_lora.hosts.standalone.infotext import png_bytes
from lib_lora.hosts.standalone.loading import DEMO, DEMO_THREADS, load_pipeline
from lib_lora.hosts.standalone.timings import similar_loras, step_times, switch_times
from lib_lora.session import LoraSession
from lib_lora.tools.grid import draw_grid

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from lib_lora.hosts.standalone.loading import LoadedModel
    from lib_lora.session import Mode

    Say = Callable[[str], None]


@dataclass(frozen=True)
class Scene:
    """One row of the grid."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Column:
    """One column of the grid: its label, the tags its prompts get, and how the LoRAs are applied."""

    label: str
    tags: str = ""
    mode: Mode = "prefuse"


SCENES = (
    Scene("a red circle on a blue background", 2),
    Scene("a yellow star on a purple background", 8),
    Scene("a green square on an orange background", 2),
    Scene("a pink heart on a white background", 2),
)
BOTH = "<lora:stripes:1> <lora:outline:1>"
COLUMNS = (
    Column("no LoRA"),
    Column("stripes 1", "<lora:stripes:1>"),
    Column("outline 1", "<lora:outline:1>"),
    Column("both at 1", BOTH),
    Column("both at 1\nhook mode", BOTH, "hook"),
    Column("stripes 0.5\noutline 1", "<lora:stripes:0.5> <lora:outline:1>"),
    Column("stripes 1\noutline 0.5", "<lora:stripes:1> <lora:outline:0.5>"),
)
FUSED, HOOKED = 3, 4
CELL = 192
SAMPLER, STEPS, CFG = "DDIM", 25, 4.0
LORA_COUNTS = (0, 1, 2, 4, 7)
SET_SIZE = 5
STEP_ROUNDS, STEP_CALLS = 15, 6
SWITCH_ROUNDS = 15


def run_demo(out: Path, say: Say) -> None:
    """Draw the grid into `out` and tell what was measured.

    Args:
        out: A PNG file, replaced if it exists.
        say: Takes each line or table when it is ready.
    """
    torch.set_num_threads(DEMO_THREADS)
    loaded = load_pipeline(DEMO, device="cpu")
    pristine = [tensor.clone() for tensor in _weights(loaded)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = ["stripes", "outline", *similar_loras(LORA_DIR / "outline.safetensors", folder, 2 * SET_SIZE - 2)]
        session = LoraSession.for_pipeline(loaded.pipe, [LORA_DIR, folder])
        pictures = [[_draw(loaded, session, scene, column, say) for column in COLUMNS] for scene in SCENES]
        grid = draw_grid([column.label for column in COLUMNS], [scene.prompt for scene in SCENES], pictures, CELL)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_bytes(out, png_bytes(grid), overwrite=True)
        say(f"Pictures in {out}; {_hook_difference(pictures)}\n")
        say(_step_table(loaded, session, names))
        say(_switch_table(session, names))
        session.unload()
    same = all(torch.equal(*pair) for pair in zip(pristine, _weights(loaded), strict=True))
    say(f"The weights after all this are {'those before it, bit for bit' if same else 'NOT those before it'}.")


def _draw(loaded: LoadedModel, session: LoraSession, scene: Scene, column: Column, say: Say) -> Image:
    """One picture of the grid; its report is told."""
    session.mode = column.mode
    prompt = f"{scene.prompt} {column.tags}".strip()
    request = GenerateRequest(prompt, steps=STEPS, cfg=CFG, seed=scene.seed, sampler=SAMPLER)
    picture = generate(loaded, session, request)[0]
    session.mode = "prefuse"
    report = str(picture.report).replace("\n", "\n  ")
    say(f"{prompt} ({column.mode} mode)\n  {report}")
    return picture.image


def _weights(loaded: LoadedModel) -> list[Tensor]:
    return [*loaded.pipe.unet.parameters(), *loaded.pipe.text_encoder.parameters()]


def _hook_difference(pictures: Sequence[Sequence[Image]]) -> str:
    most = max(np.abs(np.asarray(row[FUSED], int) - np.asarray(row[HOOKED], int)).max() for row in pictures)
    return f"hook and prefuse mode differ by at most {most} of 255"


def _step_table(loaded: LoadedModel, session: LoraSession, names: Sequence[str]) -> str:
    times = step_times(loaded.pipe.unet, session, names, LORA_COUNTS, rounds=STEP_ROUNDS, calls=STEP_CALLS)
    by_case = {(time.mode, time.loras): time for time in times}
    lines = [
        f"Time of a step (UNet, batch 2), median of {STEP_ROUNDS} rounds, and relative to no LoRA",
        f"{platform.machine()}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}",
        "LoRAs     prefuse               hook",
    ]
    for count in LORA_COUNTS:
        cells = (by_case[mode, count] for mode in ("prefuse", "hook"))
        lines.append(f"{count:>5}" + "".join(f"{cell.milliseconds:>9.1f} ms  x {cell.ratio:5.3f}  " for cell in cells))
    return "\n".join(lines) + "\n"


def _switch_table(session: LoraSession, names: Sequence[str]) -> str:
    times = switch_times(session, names[:SET_SIZE], names[SET_SIZE : 2 * SET_SIZE], SWITCH_ROUNDS)
    lines = [f"Time of a change, prefuse mode, median of {SWITCH_ROUNDS}"]
    lines += [f"{time.change:>24} {time.milliseconds:9.1f} ms" for time in times]
    return "\n".join(lines) + "\n"
