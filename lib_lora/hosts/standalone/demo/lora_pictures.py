"""What the demo LoRAs learn: pictures that show an effect at many strengths, and the list of them.

A picture drawn with an effect at strength s is learned with the network at strength s, so half the strength is half the
effect. Captions do not name the effect: no trigger word is needed.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING

from .drawing import draw, random_scene
from .train_unet import short_caption

if TYPE_CHECKING:
    from pathlib import Path

EFFECTS = ("stripes", "outline")
"""Fields of `Scene`, each learned by the LoRA of that name."""
PICTURES = 4000
LIST = "metadata.jsonl"


def write_pictures(effect: str, folder: Path, count: int = PICTURES, seed: int = 0) -> Path:
    """Draw scenes with an effect, every second one about at strength 1, the others at any.

    Args:
        effect: One of EFFECTS.
        folder: Where they go; pictures of these names are replaced.
        count: How many.
        seed: Of the scenes.

    Returns:
        The list of them, for the trainer's ``in_json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)  # noqa: S311 - pictures, no secrets
    lines: list[str] = []
    for index in range(count):
        strength = rng.choice((1.0, rng.random()))
        scene = replace(random_scene(rng), **{effect: strength})
        name = f"{index:04d}.png"
        draw(scene).save(folder / name)
        facts = {"file_name": name, "text": short_caption(scene, rng), "network_multiplier": strength}
        lines.append(json.dumps(facts) + "\n")
    path = folder / LIST
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path
