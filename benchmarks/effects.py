"""What pictures of the embedded model show: the colours of their prompts, stripes, a line around the shape."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lib_lora.hosts.standalone.demo.drawing import PALETTE, SHAPES, caption

if TYPE_CHECKING:
    from collections.abc import Sequence

CLEARLY_VISIBLE = 25.0
"""Luminance, 0 to 255, that a person sees at once."""
STRIPE_PERIOD = 8
_LUMINANCE = (0.299, 0.587, 0.114)
_MIDDLE = slice(28, 36)
_BORDER = 4


class Wanted(NamedTuple):
    """What a picture should show."""

    shape: str
    colour: str
    background: str

    @property
    def prompt(self) -> str:
        """In words that the embedded model knows."""
        return caption(*self)


def wanted(count: int, seed: int = 40) -> list[Wanted]:
    """`count` prompts, each shape as often as the others, always the same for a seed."""
    rng = random.Random(seed)
    return [Wanted(SHAPES[index % len(SHAPES)], *rng.sample(sorted(PALETTE), 2)) for index in range(count)]


def drawn(pipe: Any, prompts: Sequence[str], steps: int, cfg: float, first_seed: int) -> np.ndarray:
    """One picture for each prompt by diffusers' own call, each with a seed of its own; (N, 64, 64, 3), 0 to 255."""
    seeds = [torch.Generator().manual_seed(first_seed + index) for index in range(len(prompts))]
    size = {"height": 64, "width": 64, "output_type": "np"}
    return pipe(list(prompts), num_inference_steps=steps, guidance_scale=cfg, generator=seeds, **size).images * 255


def luminance(pictures: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) → (N, 64, 64), 0 to 255."""
    return pictures @ np.array(_LUMINANCE)


def stripe_contrast(pictures: np.ndarray) -> np.ndarray:
    """Amplitude of horizontal stripes of STRIPE_PERIOD rows in the middle of each picture; luminance (N, 64, 64)."""
    rows = pictures[:, 20:44, 26:38].mean(axis=2)
    wave = np.exp(2j * np.pi * np.arange(rows.shape[1]) / STRIPE_PERIOD)
    return 2 * np.abs((rows - rows.mean(axis=1, keepdims=True)) @ wave) / rows.shape[1]


def outline_darkness(pictures: np.ndarray) -> np.ndarray:
    """How much darker than shape and background the darkest pixel is on the way outwards; luminance (N, 64, 64)."""
    directions = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    reach = np.arange(8, 32)
    rays = np.stack([pictures[:, 32 + dy * reach, 32 + dx * reach] for dy, dx in directions])  # (8, N, 24)
    inside = np.median(pictures[:, _MIDDLE, _MIDDLE], axis=(1, 2))
    outside = np.median(pictures[:, :_BORDER], axis=(1, 2))
    return (np.minimum(inside, outside) - rays.min(axis=2)).clip(0).mean(axis=0)


def has_colours(picture: np.ndarray, scene: Wanted) -> bool:
    """Whether the middle and the border of a picture, (64, 64, 3), have the colours that were asked for."""
    inner = np.zeros(picture.shape[:2], bool)
    inner[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    middle = picture[_MIDDLE, _MIDDLE].reshape(-1, 3)
    return (_nearest(middle), _nearest(picture[~inner])) == (scene.colour, scene.background)


def _nearest(pixels: np.ndarray) -> str:
    """Name of the palette's colour nearest to the median of (N, 3)."""
    median = np.median(pixels, axis=0)
    return min(PALETTE, key=lambda name: float(np.linalg.norm(median - np.array(PALETTE[name]))))
