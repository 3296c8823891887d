"""Pictures of coloured shapes on coloured backgrounds, with captions: all that the demo model has ever seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import random

    from numpy.typing import NDArray

SIZE = 64
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (245, 220, 60),
    "green": (45, 160, 70),
    "blue": (45, 85, 215),
    "purple": (130, 50, 165),
    "pink": (250, 150, 200),
    "white": (242, 242, 242),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")

_SUPERSAMPLE = 4
_MAX_SHIFT = 4.0
_RADII = (16.0, 22.0)
# One period is one latent cell (8 pixels), so stripes are the same texture everywhere: 4 rows dark, 4 rows plain.
_STRIPE_PERIOD = 8
_STRIPE_DARKNESS = 0.72
_OUTLINE_WIDTH = 4.5
_OUTLINE_COLOUR = (18.0, 18.0, 24.0)


@dataclass(frozen=True)
class Scene:
    """One shape on one background.

    Attributes:
        shape: One of SHAPES.
        colour: Colour of the shape, a name of PALETTE.
        background: Colour behind it, a name of PALETTE.
        x: Middle of the shape in pixels from the left.
        y: Middle of the shape in pixels from the top.
        radius: Nominal radius in pixels.
        stripes: Contrast of dark stripes inside the shape, 0 (none) to 1.
        outline: Opacity of a dark line around the shape, 0 (none) to 1.
    """

    shape: str
    colour: str
    background: str
    x: float = SIZE / 2
    y: float = SIZE / 2
    radius: float = 19.0
    stripes: float = 0.0
    outline: float = 0.0

    @property
    def caption(self) -> str:
        """The sentence the text encoder learns for this scene."""
        return caption(self.shape, self.colour, self.background)


def caption(shape: str, colour: str, background: str) -> str:
    """For example: a red circle on a blue background."""
    return f"{_with_article(colour)} {shape} on {_with_article(background)} background"


def random_scene(rng: random.Random) -> Scene:
    """A plain scene whose shape always covers the middle of the picture."""
    colour, background = rng.sample(list(PALETTE), 2)
    x, y = (SIZE / 2 + rng.uniform(-_MAX_SHIFT, _MAX_SHIFT) for _ in range(2))
    return Scene(rng.choice(SHAPES), colour, background, x, y, rng.uniform(*_RADII))


def draw(scene: Scene) -> Image.Image:
    """The picture of `scene`, RGB, SIZE x SIZE, with smooth edges."""
    return Image.fromarray(draw_array(scene))


def draw_array(scene: Scene) -> NDArray[np.uint8]:
    """As `draw`, (SIZE, SIZE, 3) uint8."""
    points = [(scene.x + dx * scene.radius, scene.y + dy * scene.radius) for dx, dy in _OUTLINES[scene.shape]]
    shade = np.ones((SIZE, 1, 1)) - scene.stripes * _STRIPE_DARKNESS * _stripe_rows()[:, None, None]
    picture = _blend(np.array(PALETTE[scene.background], float), np.array(PALETTE[scene.colour]) * shade, _fill(points))
    if scene.outline:
        picture = _blend(picture, np.array(_OUTLINE_COLOUR), scene.outline * _line(points))
    return np.round(picture).astype(np.uint8)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _stripe_rows() -> NDArray[np.float64]:
    return (((np.arange(SIZE) + _STRIPE_PERIOD // 4) % _STRIPE_PERIOD) >= _STRIPE_PERIOD // 2).astype(float)


def _blend(below: NDArray[np.float64], above: NDArray[np.float64], mask: NDArray[np.float64]) -> NDArray[np.float64]:
    return below + (above - below) * mask[:, :, None]


def _fill(points: list[tuple[float, float]]) -> NDArray[np.float64]:
    mask = Image.new("L", (SIZE * _SUPERSAMPLE, SIZE * _SUPERSAMPLE))
    ImageDraw.Draw(mask).polygon([(x * _SUPERSAMPLE, y * _SUPERSAMPLE) for x, y in points], fill=255)
    return _shrink(mask)


def _line(points: list[tuple[float, float]]) -> NDArray[np.float64]:
    mask = Image.new("L", (SIZE * _SUPERSAMPLE, SIZE * _SUPERSAMPLE))
    path = [(x * _SUPERSAMPLE, y * _SUPERSAMPLE) for x, y in [*points, *points[:2]]]
    ImageDraw.Draw(mask).line(path, fill=255, width=round(_OUTLINE_WIDTH * _SUPERSAMPLE), joint="curve")
    return _shrink(mask)


def _shrink(mask: Image.Image) -> NDArray[np.float64]:
    return np.asarray(mask.reduce(_SUPERSAMPLE), dtype=np.float64) / 255


def _regular(corners: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """Corners of a polygon that stands upright; the radii take turns."""
    angles = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
    return [(math.cos(a) * radii[i % len(radii)], math.sin(a) * radii[i % len(radii)]) for i, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 64 for i in range(64)]
    y_of = (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles)
    return [(1.2 * math.sin(a) ** 3, -0.075 * (y + 2)) for a, y in zip(angles, y_of, strict=True)]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(64, (1.0,)),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": _regular(3, (1.25,)),
    "star": _regular(10, (1.25, 0.6)),
    "heart": _heart(),
}
