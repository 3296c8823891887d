"""How a figure of matplotlib becomes text or pixels; needs matplotlib.

matplotlib's own SVG is told its fonts and names of elements by settings of the whole process, is ten times as long, and
its ``$`` starts a formula. All texts are drawn as they are here.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast
from xml.sax.saxutils import escape, quoteattr

from matplotlib import font_manager
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_hex
from matplotlib.path import Path

from lib_lora.tools.plots.style import INK, LINE_HEIGHT, plain, width_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}
_ANCHORS = ("start", "middle", "end")
_ALONG = {"left": 0, "center": 1, "right": 2, "bottom": 0, "baseline": 0, "center_baseline": 1, "top": 2}
_DESCENT = 0.22
"""Of a line of text, as a part of the letters' size."""
_FONTS = (
    "DejaVu Sans",
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS"),
)
"""The first comes with matplotlib; one of the others has the letters of Chinese, if it is installed."""
_manager = cast("Any", font_manager)  # its types are told in part
_MISSING = "\N{WHITE SQUARE}"


class SvgRenderer(RendererBase):
    """Writes paths and texts as elements of SVG, one unit to a pixel.

    What is drawn in `INK` gets the colour of the page's text. An artist's gid becomes what is shown where the mouse is.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__()
        self.size = width, height
        self.elements: list[str] = []
        self._groups: list[bool] = []

    def get_canvas_width_height(self) -> tuple[float, float]:
        """In pixels."""
        return self.size

    def flipy(self) -> bool:
        """Whether y grows downwards."""
        return True

    def points_to_pixels(self, points: Any) -> Any:
        """The same: a figure has 72 dots per inch."""
        return points

    def get_text_width_height_descent(self, s: str, prop: Any, ismath: Any) -> tuple[float, float, float]:
        """About; the page chooses the font."""
        size = prop.get_size_in_points()
        return width_of(s, size), LINE_HEIGHT * size, _DESCENT * size

    def open_group(self, s: str, gid: str | None = None) -> None:
        """Begin what belongs together; only what has a text to show is a group in SVG."""
        self._groups.append(bool(gid))
        if gid:
            self.elements.append(f"<g><title>{escape(plain(gid))}</title>")

    def close_group(self, s: str) -> None:
        """End it."""
        if self._groups.pop():
            self.elements.append("</g>")

    def draw_path(self, gc: Any, path: Any, transform: Any, rgbFace: Any = None) -> None:  # noqa: N803
        """Write a shape, if anything of it can be seen."""
        width = gc.get_linewidth()
        fill, stroke = _paint("fill", rgbFace), _paint("stroke", gc.get_rgb()) if width else ""
        if not fill and not stroke:
            return
        attributes = [f'd="{self._data(path, transform)}"', fill or 'fill="none"']
        if stroke:
            attributes += [stroke, *([] if width == 1 else [f'stroke-width="{width:g}"'])]
        self.elements.append(f"<path {' '.join(attributes)}/>")

    def draw_markers(
        self,
        gc: Any,
        marker_path: Any,
        marker_trans: Any,
        path: Any,
        trans: Any,
        rgbFace: Any = None,  # noqa: N803
    ) -> None:
        """Write discs: points of a round pen."""
        diameter = marker_path.get_extents(marker_trans).width
        spots = "".join(f"M{_point(x, self.size[1] - y)}h0" for x, y in trans.transform_path(path).vertices)
        pen = f'stroke-width="{diameter:g}" stroke-linecap="round" {_paint("stroke", rgbFace)}'
        self.elements.append(f'<path d="{spots}" {pen}/>')

    def draw_text(
        self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, ismath: Any = False, mtext: Any = None
    ) -> None:
        """Write a line of text; the page's font may have another width, so it is held where it was meant to be."""
        size = prop.get_size_in_points()
        upright = round(angle) == 90
        along = 0 if mtext is None else _ALONG.get(mtext.get_va() if upright else mtext.get_ha(), 0)
        shift = along / 2 * width_of(s, size)
        x, y = (x, y - shift) if upright else (x + shift, y)
        place = f'transform="translate({_point(x, y)}) rotate(-90)"' if upright else f'x="{_short(x)}" y="{_short(y)}"'
        weight = ' font-weight="600"' if prop.get_weight() == "bold" else ""
        anchor = f' text-anchor="{_ANCHORS[along]}"' if along else ""
        paint = _paint("fill", gc.get_rgb())
        self.elements.append(f'<text {place} font-size="{size:g}"{anchor}{weight} {paint}>{escape(plain(s))}</text>')

    def draw_tex(self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, *, mtext: Any = None) -> None:
        """What a setting of the process would hand to TeX is a text too."""
        self.draw_text(gc, x, y, s, prop, angle, mtext=mtext)

    def document(self, label: str) -> str:
        """All that was drawn, as wide as where it stands.

        Args:
            label: What it shows, for those who can not see it.
        """
        width, height = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="100%" role="img"'
        look = f'style="max-width:{1.5 * width:g}px;height:auto" font-family="inherit"'
        return f"{head} aria-label={quoteattr(plain(label))} {look}>{''.join(self.elements)}</svg>"

    def _data(self, path: Any, transform: Any) -> str:
        moved = transform.transform_path(path)
        height, parts = self.size[1], list[str]()
        for points, code in moved.iter_segments(simplify=False):
            if code == Path.CLOSEPOLY:
                parts.append("z")
                continue
            pairs = zip(points[::2], points[1::2], strict=True)
            parts.append(_COMMANDS[code] + " ".join(_point(x, height - y) for x, y in pairs))
        return "".join(parts)


class PixelRenderer(RendererAgg):
    """Draws as matplotlib does, but every text as it is, in fonts that have its letters."""

    def get_text_width_height_descent(self, s: str, prop: Any, ismath: Any) -> tuple[float, float, float]:
        """In pixels."""
        return super().get_text_width_height_descent(_drawable(s), _with_fonts(prop), False)

    def draw_text(
        self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, ismath: Any = False, mtext: Any = None
    ) -> None:
        """Draw a line of text."""
        super().draw_text(gc, x, y, _drawable(s), _with_fonts(prop), angle, ismath=False, mtext=mtext)

    def draw_tex(self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, *, mtext: Any = None) -> None:
        """What a setting of the process would hand to TeX is a text too."""
        self.draw_text(gc, x, y, s, prop, angle, mtext=mtext)


def _short(pixels: float) -> str:
    return f"{round(float(pixels), 1):g}"


def _point(x: float, y: float) -> str:
    return f"{_short(x)} {_short(y)}"


def _paint(name: str, colour: Any) -> str:
    """An attribute, or nothing where nothing would be seen."""
    opacity = 1.0 if colour is None or len(colour) < 4 else colour[3]
    if colour is None or not opacity:
        return ""
    told = f'{name}="{"currentColor" if to_hex(colour) == INK else to_hex(colour)}"'
    return told if opacity == 1 else f'{told} {name}-opacity="{opacity:.3g}"'


def _drawable(text: str) -> str:
    return "".join(letter if _has_letter(ord(letter)) else _MISSING for letter in plain(text))


@cache
def _fonts() -> Sequence[str]:
    installed = set(_manager.fontManager.get_font_names())
    return [name for name in _FONTS if name in installed]


@cache
def _has_letter(code: int) -> bool:
    files = (_manager.findfont(_manager.FontProperties(family=[name])) for name in _fonts())
    return any(_manager.get_font(file).get_char_index(code) for file in files)


def _with_fonts(prop: Any) -> Any:
    prop = prop.copy()
    prop.set_family(_fonts())
    return prop
