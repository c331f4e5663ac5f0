"""Charts, drawn once and written as SVG (for pages) or PNG (for TensorBoard and documents).

A drawing is a list of shapes whose colours are roles such as "ink" or "series 0": a page maps them
to CSS variables, so that it can be light or dark, and a PNG to the light colours. The colours of
series are those of M. Okabe and K. Ito, which colour-blind people can tell apart; a dash pattern
goes with each. Nothing but Pillow is needed, and that only for PNGs.

Units are CSS pixels; y grows downwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Point = tuple[float, float]
RGB = tuple[int, int, int]
Anchor = Literal["start", "middle", "end"]

#: Light and dark colours by role.
COLOURS: dict[str, tuple[RGB, RGB]] = {
    "paper": ((255, 255, 255), (24, 26, 31)),
    "ink": ((32, 33, 36), (232, 234, 237)),
    "muted": ((95, 99, 104), (154, 160, 166)),
    "grid": ((224, 226, 230), (60, 64, 67)),
    "good": ((0, 114, 178), (86, 180, 233)),
    "bad": ((190, 80, 0), (240, 160, 60)),
    "series0": ((0, 114, 178), (86, 180, 233)),
    "series1": ((213, 94, 0), (230, 130, 50)),
    "series2": ((0, 140, 103), (0, 180, 135)),
    "series3": ((190, 100, 150), (220, 140, 185)),
    "series4": ((140, 110, 0), (230, 190, 50)),
    "series5": ((70, 70, 70), (200, 200, 200)),
}
N_SERIES = 6
DASHES: tuple[tuple[float, ...], ...] = ((), (7, 3), (2, 3), (9, 3, 2, 3), (4, 2), (12, 4))
# From dark to light through blue, green and yellow: its lightness rises evenly, so that it reads
# in grey and without telling red from green.
_HEAT = np.array(
    [(68, 1, 84), (62, 74, 137), (38, 130, 142), (53, 183, 121), (170, 220, 50), (253, 231, 37)],
    dtype=np.float64,
)
# PNGs are drawn so many times too large and shrunk: Pillow's own lines have hard edges.
_OVERSAMPLING = 3


@dataclass(frozen=True)
class Line:
    """Straight segments through ``points``; ``dash`` alternates drawn and left-out lengths."""

    points: tuple[Point, ...]
    role: str
    width: float = 1.0
    opacity: float = 1.0
    dash: tuple[float, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Polygon:
    """A filled shape, in a role's colour or in ``rgb``."""

    points: tuple[Point, ...]
    role: str = "ink"
    opacity: float = 1.0
    rgb: RGB | None = None
    label: str = ""


@dataclass(frozen=True)
class Text:
    """One line of text; ``at`` is on its baseline."""

    at: Point
    text: str
    role: str = "ink"
    size: float = 12.0
    anchor: Anchor = "start"
    bold: bool = False


Shape = Line | Polygon | Text


@dataclass(frozen=True)
class Drawing:
    """Shapes on an area of ``width`` x ``height``; ``title`` is what a screen reader says."""

    width: float
    height: float
    title: str
    shapes: list[Shape] = field(default_factory=list)


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        label: of its run.
        series: which of the series colours it has.
        x, y: of its points; points that are not finite break the line.
        faint: drawn thin and pale, as the raw points behind a smoothed curve are.
        marked: with a dot at each point, as few points need.
    """

    label: str
    series: int
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    marked: bool = False


# ---- Charts -------------------------------------------------------------------------------------


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    better: Literal["higher", "lower"] | None = None,
    unit: str = "",
    width: float = 420.0,
    height: float = 240.0,
) -> Drawing:
    """Curves over optimizer steps, with the direction that is better as an arrow and in words."""
    left, right, top, bottom = 58.0, 12.0, 44.0, 34.0
    points = [(x, y) for c in curves for x, y in zip(c.x, c.y, strict=True) if math.isfinite(y)]
    xs, ys = [x for x, _ in points] or [0.0, 1.0], [y for _, y in points] or [0.0, 1.0]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min([*ys, y_ticks[0]]), max([*ys, y_ticks[-1]])

    def place(x: float, y: float) -> Point:
        across = 0.5 if x_high - x_low < 1e-6 else (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            left + across * (width - left - right),
            height - bottom - up * (height - top - bottom),
        )

    shapes: list[Shape] = [Text((left, 17), title, size=13, bold=True)]
    shapes += _direction(left, 34, better, unit)
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        _, y = place(x_low, tick)
        shapes.append(Line(((left, y), (width - right, y)), "grid"))
        shapes.append(Text((left - 6, y + 4), label, "muted", 11, "end"))
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        if x_low <= tick <= x_high:
            shapes.append(Text((place(tick, y_low)[0], height - 17), label, "muted", 11, "middle"))
    shapes.append(Text((width - right, height - 3), "step", "muted", 10, "end"))
    for curve in sorted(curves, key=lambda c: not c.faint):  # faint ones below
        for run in _unbroken(curve):
            placed = tuple(place(x, y) for x, y in run)
            role = f"series{curve.series % N_SERIES}"
            if curve.marked or len(placed) == 1:
                shapes += [_dot(at, role, 2.0 if curve.faint else 2.6) for at in placed]
            if len(placed) > 1:
                shapes.append(
                    Line(
                        placed,
                        role,
                        width=1.0 if curve.faint else 2.0,
                        opacity=0.35 if curve.faint else 1.0,
                        dash=() if curve.faint else DASHES[curve.series % N_SERIES],
                        label=curve.label,
                    )
                )
        for x, y in zip(curve.x, curve.y, strict=True):
            if not math.isfinite(y):
                shapes += _cross(place(x, y_low), "bad")
    if not points:
        shapes.append(Text((width / 2, height / 2), "no finite value", "muted", 12, "middle"))
    words = f", {better} is better" if better else ""
    return Drawing(width, height, f"{title} over training steps{words}", shapes)


def stacked_bars(
    title: str,
    bars: Sequence[tuple[str, Sequence[float]]],
    parts: Sequence[str],
    *,
    unit: str,
    width: float = 640.0,
) -> Drawing:
    """One horizontal bar per entry, divided into parts, with the share of each part written in."""
    left, row, top = 130.0, 30.0, 52.0
    height = top + row * len(bars) + 10
    longest = max([math.fsum(values) for _, values in bars] or [0.0]) or 1.0
    shapes: list[Shape] = [Text((0, 17), title, size=13, bold=True)]
    x = left
    for number, part in enumerate(parts):
        shapes.append(rectangle(x, 29, 11, 11, f"series{number}"))
        shapes.append(Text((x + 16, 39), part, "muted", 11))
        x += 34 + 6.4 * len(part)
    for number, (label, values) in enumerate(bars):
        y = top + row * number
        total = math.fsum(values)
        shapes.append(Text((left - 8, y + 16), _short(label, 19), "ink", 12, "end"))
        x = left
        for place, value in enumerate(values):
            long = (width - left - 80) * value / longest
            shapes.append(rectangle(x, y, long, 22, f"series{place}", label=parts[place]))
            if total > 0 and long > 36:
                share = f"{100 * value / total:.0f} %"
                shapes.append(Text((x + long / 2, y + 15), share, "paper", 11, "middle"))
            x += long
        shapes.append(Text((x + 6, y + 16), f"{total:.3g} {unit}", "muted", 11))
    return Drawing(width, height, title, shapes)


def heat_map(
    title: str,
    values: NDArray[np.float64],
    *,
    x_edges: Sequence[float],
    y_edges: Sequence[float],
    x_label: str,
    y_label: str,
    width: float = 640.0,
    height: float = 320.0,
) -> Drawing:
    """Cells coloured by value; those without one (NaN) are left out.

    Args:
        title: above it.
        values: (rows, columns); row 0 is drawn at the bottom.
        x_edges, y_edges: columns + 1 and rows + 1 numbers.
        x_label, y_label: what they count.
    """
    left, right, top, bottom = 58.0, 76.0, 40.0, 42.0
    rows, columns = values.shape
    shown = values[np.isfinite(values)]
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
    scale = (high - low) or 1.0
    wide, tall = (width - left - right) / columns, (height - top - bottom) / rows
    shapes: list[Shape] = [
        Text((left, 17), title, size=13, bold=True),
        Text((left - 50, 33), y_label, "muted", 11),
        Text((left + wide * columns, height - 6), x_label, "muted", 11, "end"),
    ]
    for row in range(rows):
        for column in range(columns):
            value = float(values[row, column])
            if math.isfinite(value):
                shapes.append(
                    rectangle(
                        left + wide * column,
                        height - bottom - tall * (row + 1),
                        wide,
                        tall,
                        rgb=heat_colour((value - low) / scale),
                    )
                )
    for place in _some(columns):
        at = (left + wide * place, height - bottom + 16)
        shapes.append(Text(at, f"{x_edges[place]:g}", "muted", 11, "middle"))
    for place in _some(rows):
        at = (left - 6, height - bottom - tall * place + 4)
        shapes.append(Text(at, f"{y_edges[place]:g}", "muted", 11, "end"))
    steps = 32
    bar = (height - top - bottom) / steps
    for step in range(steps):
        y = height - bottom - bar * (step + 1)
        colour = heat_colour((step + 0.5) / steps)
        shapes.append(rectangle(width - right + 14, y, 14, bar, rgb=colour))
    shapes.append(Text((width - right + 33, top + 9), f"{high:.3g}", "muted", 11))
    shapes.append(Text((width - right + 33, height - bottom), f"{low:.3g}", "muted", 11))
    return Drawing(width, height, title, shapes)


def heat_colour(share: float) -> RGB:
    """The colour of a value at ``share`` (0 to 1) of the way from the lowest to the highest."""
    place = min(max(share, 0.0), 1.0) * (len(_HEAT) - 1)
    low = min(int(place), len(_HEAT) - 2)
    red, green, blue = _HEAT[low] + (place - low) * (_HEAT[low + 1] - _HEAT[low])
    return round(red), round(green), round(blue)


def side_by_side(drawings: Sequence[Drawing], columns: int, gap: float = 16.0) -> Drawing:
    """The drawings in rows of ``columns``, as one."""
    shapes: list[Shape] = []
    y, widest = 0.0, 0.0
    for first in range(0, len(drawings), columns):
        x = 0.0
        for drawing in drawings[first : first + columns]:
            shapes += [_moved(shape, x, y) for shape in drawing.shapes]
            x += drawing.width + gap
        widest = max(widest, x - gap)
        y += max(drawing.height for drawing in drawings[first : first + columns]) + gap
    return Drawing(widest, y - gap, "; ".join(drawing.title for drawing in drawings), shapes)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that span ``low`` to ``high``: multiples of 1, 2 or 5 times a power of 10."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):
        room = abs(low) * 0.1
        low, high = (low - room, high + room) if room else (0.0, 1.0)
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(places: Sequence[float]) -> list[str]:
    """The ticks as text, with as many digits as tell neighbours apart."""
    step = places[1] - places[0]
    largest = max(abs(place) for place in places)
    if largest >= 1e6 or step < 1e-5:
        digits = max(0, math.ceil(math.log10(largest / step) - 1e-9))
        return [f"{place:.{digits}e}" if place else "0" for place in places]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{place + 0.0:.{decimals}f}" for place in places]


# ---- Writing ------------------------------------------------------------------------------------


def to_svg(drawing: Drawing) -> str:
    """The drawing as an SVG element whose colours are CSS variables; text is escaped."""
    size = f"{drawing.width:g} {drawing.height:g}"
    body = "".join(_svg_shape(shape) for shape in drawing.shapes)
    return (
        f'<svg viewBox="0 0 {size}" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'font-family="system-ui, sans-serif"><title>{escape(drawing.title)}</title>{body}</svg>'
    )


def css_variables(*, dark: bool) -> str:
    """CSS declarations of the roles that :func:`to_svg` refers to."""
    return " ".join(
        f"--{role}: rgb{colours[int(dark)]};".replace(" ", "") for role, colours in COLOURS.items()
    )


def to_image(drawing: Drawing, scale: float = 2.0) -> Image:
    """The drawing in light colours.

    Args:
        drawing: what to draw.
        scale: pixels per unit.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError(
            "PNGs are drawn by Pillow, which is not installed: pip install pillow. (Pages need "
            "none.)"
        ) from error
    fine = scale * _OVERSAMPLING
    pixels = (math.ceil(drawing.width * fine), math.ceil(drawing.height * fine))
    image = Image.new("RGB", pixels, COLOURS["paper"][0])
    draw = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        if isinstance(shape, Text):
            font = ImageFont.load_default(shape.size * fine)
            at = (shape.at[0] * fine, shape.at[1] * fine)
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
            stroke = 0.03 * shape.size * fine if shape.bold else 0
            draw.text(at, shape.text, COLOURS[shape.role][0], font, anchor, stroke_width=stroke)
            continue
        colour = shape.rgb if isinstance(shape, Polygon) and shape.rgb else COLOURS[shape.role][0]
        colour = _on_white(colour, shape.opacity)
        if isinstance(shape, Polygon):
            draw.polygon([(x * fine, y * fine) for x, y in shape.points], fill=colour)
            continue
        for part in _dashed(shape.points, shape.dash):
            scaled = [(x * fine, y * fine) for x, y in part]
            draw.line(scaled, fill=colour, width=max(1, round(shape.width * fine)), joint="curve")
    final = (math.ceil(drawing.width * scale), math.ceil(drawing.height * scale))
    return image.resize(final, Image.Resampling.LANCZOS)


def to_png(drawing: Drawing, scale: float = 2.0) -> bytes:
    """The drawing as a PNG file in light colours."""
    image = to_image(drawing, scale)
    from PIL.Image import Dither  # there if to_image has returned

    buffer = BytesIO()
    image.quantize(64, dither=Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# ---- Parts --------------------------------------------------------------------------------------


def rectangle(
    x: float,
    y: float,
    width: float,
    height: float,
    role: str = "ink",
    *,
    rgb: RGB | None = None,
    label: str = "",
) -> Polygon:
    """An upright rectangle with its upper left corner at (x, y)."""
    corners = ((x, y), (x + width, y), (x + width, y + height), (x, y + height))
    return Polygon(corners, role, rgb=rgb, label=label)


def _direction(x: float, y: float, better: str | None, unit: str) -> list[Shape]:
    """An arrow and the words that go with it, then the unit."""
    shapes: list[Shape] = []
    text = unit
    if better is not None:
        tip, base = (y - 9, y - 1) if better == "higher" else (y - 1, y - 9)
        shapes.append(Polygon(((x, base), (x + 9, base), (x + 4.5, tip)), "good"))
        text = f"{better} is better" + (f"  ({unit})" if unit else "")
    offset = 14 if better is not None else 0
    return [*shapes, Text((x + offset, y), text, "muted", 11)] if text else shapes


def _unbroken(curve: Curve) -> list[list[Point]]:
    """The stretches of a curve between points that are not finite."""
    runs: list[list[Point]] = [[]]
    for x, y in zip(curve.x, curve.y, strict=True):
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _dot(at: Point, role: str, radius: float) -> Polygon:
    corners = tuple(
        (
            at[0] + radius * math.cos(math.pi * corner / 4),
            at[1] + radius * math.sin(math.pi * corner / 4),
        )
        for corner in range(8)
    )
    return Polygon(corners, role)


def _cross(at: Point, role: str) -> list[Shape]:
    x, y = at
    return [
        Line(((x - 3, y - 3), (x + 3, y + 3)), role, 1.6, label="not finite"),
        Line(((x - 3, y + 3), (x + 3, y - 3)), role, 1.6, label="not finite"),
    ]


def _moved(shape: Shape, x: float, y: float) -> Shape:
    if isinstance(shape, Text):
        return replace(shape, at=(shape.at[0] + x, shape.at[1] + y))
    return replace(shape, points=tuple((px + x, py + y) for px, py in shape.points))


def _some(count: int) -> list[int]:
    """About five of the edges 0 to ``count``."""
    return list(range(0, count + 1, max(1, math.ceil(count / 5))))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _dashed(points: tuple[Point, ...], dash: tuple[float, ...]) -> list[list[Point]]:
    """What is left of the segments through ``points`` when the gaps of ``dash`` are cut out."""
    if not dash:
        return [list(points)]
    parts: list[list[Point]] = [[points[0]]]
    number, left = 0, dash[0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while length - done > left:
            done += left
            at = (x0 + (x1 - x0) * done / length, y0 + (y1 - y0) * done / length)
            if number % 2 == 0:
                parts[-1].append(at)
            else:
                parts.append([at])
            number += 1
            left = dash[number % len(dash)]
        left -= length - done
        if number % 2 == 0:
            parts[-1].append((x1, y1))
    return [part for part in parts if len(part) > 1]


def _on_white(colour: RGB, opacity: float) -> RGB:
    red, green, blue = (round(255 + opacity * (part - 255)) for part in colour)
    return red, green, blue


def _svg_shape(shape: Shape) -> str:
    if isinstance(shape, Text):
        weight = ' font-weight="600"' if shape.bold else ""
        return (
            f'<text x="{shape.at[0]:.1f}" y="{shape.at[1]:.1f}" font-size="{shape.size:g}" '
            f'text-anchor="{shape.anchor}"{weight} style="fill:var(--{shape.role})">'
            f"{escape(shape.text)}</text>"
        )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
    title = f"<title>{escape(shape.label)}</title>" if shape.label else ""
    faded = f' opacity="{shape.opacity:g}"' if shape.opacity != 1 else ""
    if isinstance(shape, Polygon):
        fill = f"rgb{shape.rgb}" if shape.rgb else f"var(--{shape.role})"
        return f'<polygon points="{points}"{faded} style="fill:{fill}">{title}</polygon>'
    dash = f' stroke-dasharray="{" ".join(f"{d:g}" for d in shape.dash)}"' if shape.dash else ""
    return (
        f'<polyline points="{points}" fill="none" stroke-width="{shape.width:g}"{faded}{dash} '
        f'stroke-linejoin="round" style="stroke:var(--{shape.role})">{title}</polyline>'
    )
