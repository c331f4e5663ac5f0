"""Charts drawn by matplotlib: as SVG for pages in light and dark mode, and as PNG in light colours.

Colours have roles such as "ink" or "series0". In an SVG they are CSS variables, which a page sets
for its light and its dark mode. Colours of series are those of M. Okabe and K. Ito, which
colour-blind people can distinguish; each has a dash pattern, too.

matplotlib is imported when something is drawn; the extra `plots` installs it.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Light and dark colours by role.
COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#181a1f"),
    "ink": ("#202124", "#e8eaed"),
    "muted": ("#5f6368", "#9aa0a6"),
    "grid": ("#e0e2e6", "#3c4043"),
    "good": ("#0072b2", "#56b4e9"),
    "bad": ("#be5000", "#f0a03c"),
    "series0": ("#0072b2", "#56b4e9"),
    "series1": ("#d55e00", "#e68232"),
    "series2": ("#008c67", "#00b487"),
    "series3": ("#be6496", "#dc8cb9"),
    "series4": ("#8c6e00", "#e6be32"),
    "series5": ("#464646", "#c8c8c8"),
}
N_SERIES = 6
#: Lengths of dashes and gaps in turn; empty for a solid line.
DASHES: tuple[tuple[float, ...], ...] = ((), (7, 3), (2, 3), (9, 3, 2, 3), (4, 2), (12, 4))
# If an artist's name begins with this, browsers show the rest of the name as a label on hover.
_HOVER = "hover:"
_PIXELS_PER_INCH = 96
_STYLE: dict[Any, Any] = {
    "font.size": 8.25,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "hf_ebft",  # the same page for the same run
    "text.parse_math": False,  # names of runs may hold dollar signs
    "lines.scale_dashes": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.edgecolor": COLOURS["grid"][0],
    "axes.formatter.useoffset": False,
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "axes.titlesize": 9.75,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": COLOURS["ink"][0],
    "axes.labelcolor": COLOURS["muted"][0],
    "text.color": COLOURS["ink"][0],
    "xtick.color": COLOURS["muted"][0],
    "ytick.color": COLOURS["muted"][0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": COLOURS["grid"][0],
    "legend.labelcolor": COLOURS["muted"][0],
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Drawing:
    """A chart that can be drawn into any figure.

    Attributes:
        title: text for screen readers.
        draw: draws it on axes.
        width, height: size in CSS pixels.
        margins: left, right, top and bottom margins of the axes, in CSS pixels.
    """

    title: str
    draw: Callable[[Axes], None]
    width: float = 420.0
    height: float = 240.0
    margins: tuple[float, float, float, float] = (52.0, 14.0, 46.0, 36.0)


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        label: label of its run.
        series: index of its colour.
        x, y: its points; points that are not finite break the line.
        faint: whether it is thin and pale, like the raw points behind a smoothed curve.
        marked: whether each point has a dot, for curves with few points.
    """

    label: str
    series: int
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    marked: bool = False


def require_matplotlib(what: str) -> None:
    """Raise unless charts can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            f"{what} needs matplotlib, which is not installed: pip install matplotlib, or hf_ebft "
            "with its extra 'plots'."
        )


# ---- Charts -------------------------------------------------------------------------------------


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    better: Literal["higher", "lower"] | None = None,
    unit: str = "",
    x_label: str = "step",
) -> Drawing:
    """Curves over optimizer steps; an arrow and words show the better direction.

    Args:
        title: title of the chart.
        curves: at least one.
        better: the better direction.
        unit: unit of the values.
        x_label: label of the x axis.
    """

    def draw(axes: Axes) -> None:
        axes.set_title(title, pad=19)
        _write_direction(axes, better, unit)
        axes.grid(axis="y")
        axes.set_xlabel(x_label, loc="right")
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.locator_params(axis="y", nbins=5)
        for curve in curves:
            _draw_curve(axes, curve)
        steps = [step for curve in curves for step in curve.x]
        if len(set(steps)) > 1:
            axes.set_xlim(min(steps), max(steps))
        values = [y for curve in curves for y in curve.y if math.isfinite(y)]
        if values:  # from a line of the grid to a line of the grid
            marks = axes.yaxis.get_major_locator().tick_values(*_spread(min(values), max(values)))
            axes.set_yticks(marks)
            axes.set_ylim(marks[0], marks[-1])
        else:
            words: dict[str, Any] = {"ha": "center", "color": COLOURS["muted"][0]}
            axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, **words)

    direction = f", {better} is better" if better else ""
    over = "training steps" if x_label == "step" else x_label
    return Drawing(f"{title} over {over}{direction}", draw)


def _spread(low: float, high: float) -> tuple[float, float]:
    """The range of a curve; for a constant one a few per cent around its value, or 1 around 0."""
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    margin = 0.05 * max(abs(low), abs(high)) or 1.0
    return low - margin, high + margin


def stacked_bars(
    title: str, bars: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], *, unit: str
) -> Drawing:
    """One horizontal bar per entry, divided into parts that are labelled with their shares."""
    totals = [math.fsum(values) for _, values in bars]
    longest = max(totals, default=0.0) or 1.0

    def draw(axes: Axes) -> None:
        axes.set_title(title, pad=20)
        starts = np.zeros(len(bars))
        for number, part in enumerate(parts):
            values = np.array([values[number] for _, values in bars])
            shares = [value / (total or 1.0) for value, total in zip(values, totals, strict=True)]
            colour = COLOURS[f"series{number}"][0]
            drawn = axes.barh(range(len(bars)), values, 0.7, starts, color=colour, label=part)
            for patch in drawn:
                patch.set_gid(_HOVER + part)
            labels = [
                f"{100 * share:.0f} %" if value > 0.06 * longest else ""
                for share, value in zip(shares, values, strict=True)
            ]
            axes.bar_label(drawn, labels, label_type="center", color=COLOURS["paper"][0])
            starts += values
        for row, total in enumerate(totals):
            axes.annotate(
                f"{total:.3g} {unit}",
                (total, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=COLOURS["muted"][0],
            )
        axes.set_xlim(0, 1.12 * longest)
        axes.set_ylim(len(bars) - 0.5, -0.5)  # the first one on top
        names = [label if len(label) <= 19 else label[:16] + "..." for label, _ in bars]
        axes.set_yticks(range(len(bars)), names, color=COLOURS["ink"][0])
        axes.set_xticks([])
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.97)}
        axes.legend(ncols=len(parts), **place, handlelength=1, handleheight=1)

    height = 62 + 30 * len(bars)
    return Drawing(title, draw, width=640, height=height, margins=(130, 12, 54, 8))


def interval_chart(
    title: str,
    entries: Sequence[tuple[str, float, float, float]],
    *,
    x_label: str,
    mark: tuple[str, float] | None = None,
    logarithmic: bool = False,
) -> Drawing:
    """One horizontal interval per entry, with a dot at its value.

    Args:
        title: title of the chart.
        entries: name, value, lower and upper bound of each; infinite bounds and values are drawn at
            the edge, without a dot.
        x_label: label of the x axis.
        mark: name and position of a vertical line.
        logarithmic: whether the axis is logarithmic; all numbers must then be above 0.
    """
    numbers = [x for _, *values in entries for x in values if math.isfinite(x)]
    numbers += [] if mark is None else [mark[1]]
    low, high = _spread(min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    if logarithmic:
        limits = low / 2, high * 4
    else:
        margin = 0.08 * (high - low)
        limits = low - margin, high + margin

    def draw(axes: Axes) -> None:
        axes.set_title(title, pad=12)
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xlim(*limits)
        axes.set_ylim(len(entries) - 0.5, -0.5)  # the first one on top
        axes.grid(axis="x")
        axes.set_xlabel(x_label, loc="right")
        colour = COLOURS["series0"][0]
        for row, (name, value, start, end) in enumerate(entries):
            ends = [min(max(x, limits[0]), limits[1]) for x in (start, end)]
            axes.plot(ends, [row, row], color=colour, linewidth=2, gid=_HOVER + name)
            if math.isfinite(value):
                axes.plot([value], [row], "o", color=colour, markersize=6, gid=_HOVER + name)
        if mark is not None:
            axes.axvline(mark[1], color=COLOURS["bad"][0], linestyle=(0, (4, 3)))
            axes.annotate(
                mark[0],
                (mark[1], 1.0),
                (3, 1),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                color=COLOURS["bad"][0],
            )
        names = [name for name, *_ in entries]
        axes.set_yticks(range(len(entries)), names, color=COLOURS["ink"][0])

    height = 84 + 26 * len(entries)
    return Drawing(title, draw, width=560, height=height, margins=(130, 14, 36, 36))


def heat_map(
    title: str,
    values: NDArray[np.float64],
    *,
    x_edges: Sequence[float],
    y_edges: Sequence[float],
    x_label: str,
    y_label: str,
) -> Drawing:
    """Cells coloured by value; those without one (NaN) are left out.

    Args:
        title: title of the chart.
        values: (rows, columns); row 0 is drawn at the bottom.
        x_edges, y_edges: columns + 1 and rows + 1 numbers.
        x_label, y_label: labels of the axes.
    """

    def draw(axes: Axes) -> None:
        axes.set_title(title)
        cells = axes.pcolormesh(x_edges, y_edges, np.ma.masked_invalid(values), cmap="viridis")
        bar = axes.figure.colorbar(cells, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.locator_params(axis="x", integer=True)

    return Drawing(title, draw, width=460, height=300, margins=(52, 8, 30, 42))


# ---- Writing ------------------------------------------------------------------------------------


def to_svg(drawing: Drawing) -> str:
    """The chart as an SVG element for a page: without ids, with text, colours as CSS variables.

    Raises:
        ImportError: matplotlib is not installed.
    """
    buffer = StringIO()
    with _style():
        figure = _figure([drawing], 1)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    left_out = r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|<clipPath.*?</clipPath>"
    # Remove fonts (the page sets its own), clipping paths (curves stay inside) and angles of 0.
    left_out += r"|font-family: [^;\"]*;|clip-path=\"[^\"]*\"|transform=\"rotate\(-0 [^\"]*\""
    svg = re.sub(left_out, "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(rf'<g id="{_HOVER}([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for role, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{role})")
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><").strip()
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    head = f'<svg {size[0]} role="img" font-family="system-ui, sans-serif" '
    head += 'stroke-linejoin="round" xmlns="http://www.w3.org/2000/svg" '
    head += f'xmlns:xlink="http://www.w3.org/1999/xlink"><title>{escape(drawing.title)}</title>'
    return head + svg[svg.index(">") + 1 :]


def css_variables(*, dark: bool) -> str:
    """CSS declarations of the roles that `to_svg` refers to."""
    return " ".join(f"--{role}: {colours[int(dark)]};" for role, colours in COLOURS.items())


def to_png(
    drawings: Sequence[Drawing], columns: int = 1, legend: Sequence[str] = (), scale: float = 2.0
) -> bytes:
    """Charts as one PNG file in light colours, arranged in rows.

    Args:
        drawings: drawings of the same size.
        columns: number of charts side by side.
        legend: names of the series, shown above the charts; empty for no legend.
        scale: pixels per CSS pixel.

    Raises:
        ImportError: matplotlib is not installed.
    """
    buffer = BytesIO()
    with _style():
        figure = _figure(drawings, columns, legend)
        dpi = scale * _PIXELS_PER_INCH
        figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def to_pixels(drawing: Drawing, scale: float = 2.0) -> NDArray[np.uint8]:
    """The chart in light colours as (height, width, 3) bytes, for TensorBoard.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with _style():
        figure = _figure([drawing], 1)
        figure.set_dpi(scale * _PIXELS_PER_INCH)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ---- Parts --------------------------------------------------------------------------------------


def _style() -> AbstractContextManager[None]:
    require_matplotlib("A chart")
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _figure(drawings: Sequence[Drawing], columns: int, legend: Sequence[str] = ()) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(columns, len(drawings))
    rows = math.ceil(len(drawings) / columns)
    wide, tall = drawings[0].width, drawings[0].height
    width, height = columns * wide, rows * tall + (30 if legend else 0)
    figure = Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH))
    for number, drawing in enumerate(drawings):
        row, column = divmod(number, columns)
        left, right, top, bottom = drawing.margins
        x, y = column * wide + left, (rows - 1 - row) * tall + bottom
        place = (x / width, y / height)
        size = ((wide - left - right) / width, (tall - top - bottom) / height)
        drawing.draw(figure.add_axes((*place, *size)))
    if legend:
        keys = [Line2D([], [], **_line_style(number)) for number in range(len(legend))]
        figure.legend(keys, legend, loc="upper left", ncols=len(legend), handlelength=3)
    return figure


def _line_style(series: int) -> dict[str, Any]:
    number = series % N_SERIES
    dash = DASHES[number]
    style = "solid" if not dash else (0, dash)
    return {"color": COLOURS[f"series{number}"][0], "linestyle": style, "linewidth": 1.6}


def _draw_curve(axes: Axes, curve: Curve) -> None:
    x, y = np.asarray(curve.x, dtype=np.float64), np.asarray(curve.y, dtype=np.float64)
    finite = np.isfinite(y)
    style = _line_style(curve.series)
    if curve.faint:
        style |= {"linestyle": "solid", "linewidth": 0.8, "alpha": 0.35, "zorder": 1.5}
    # Everything is inside the axes, so no clipping path is needed and the SVG needs no ids.
    hover: dict[str, Any] = {"gid": _HOVER + curve.label, "clip_on": False}
    axes.plot(x, np.where(finite, y, np.nan), **style, **hover)
    beside = np.concatenate([[False], finite, [False]])
    alone = finite & ~beside[:-2] & ~beside[2:]  # a line would not show a single point
    dots = finite if curve.marked else alone
    size = 2.4 if curve.faint else 3.2
    axes.plot(x[dots], y[dots], "o", markersize=size, color=style["color"], clip_on=False)
    if not finite.all():
        axes.plot(
            x[~finite],
            np.zeros((~finite).sum()),
            "x",
            markersize=4.5,
            color=COLOURS["bad"][0],
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            gid=f"{_HOVER}not finite",
        )


def _write_direction(axes: Axes, better: str | None, unit: str) -> None:
    """Write an arrow with its words, then the unit."""
    place: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "va": "bottom",
    }
    if better is not None:
        arrow = "\N{BLACK UP-POINTING TRIANGLE}"
        arrow = arrow if better == "higher" else "\N{BLACK DOWN-POINTING TRIANGLE}"
        axes.annotate(arrow, (0, 1), (0, 5), color=COLOURS["good"][0], **place)
        unit = f"{better} is better" + (f"  ({unit})" if unit else "")
    offset = 12 if better is not None else 0
    axes.annotate(unit, (0, 1), (offset, 5), color=COLOURS["muted"][0], **place)
