"""Charts: that what is drawn is where the numbers are, and that text stays text."""

import importlib.util
import math
import re
import xml.etree.ElementTree as ElementTree
from io import BytesIO
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

from hf_ebft.watching.charts import (
    COLOURS,
    DASHES,
    N_SERIES,
    Curve,
    Drawing,
    css_variables,
    heat_map,
    line_chart,
    require_matplotlib,
    stacked_bars,
    to_pixels,
    to_png,
    to_svg,
)
from tests.support.plots import axes_of, curves_of, texts_of

HOSTILE = "<script>alert(1)</script> & \"' $x^2$ hover:"


def test_points_lie_where_their_values_are() -> None:
    axes = axes_of(line_chart("t", [Curve("run", 0, [0, 5, 10], [0.0, 1.0, 0.5])]))
    (line,) = curves_of(axes, 0)
    assert line.get_xydata().tolist() == [[0, 0], [5, 1], [10, 0.5]]
    assert axes.get_xlim() == (0, 10)
    low, high = axes.get_ylim()
    assert low <= 0 < 1 <= high
    assert not axes.yaxis_inverted(), "up is more"


def test_gaps_break_lines_and_are_marked() -> None:
    values = [0.0, 1.0, math.nan, 2.0, 3.0, math.inf, 4.0]
    axes = axes_of(line_chart("t", [Curve("run", 1, range(7), values)]))
    (line,) = curves_of(axes, 1)
    assert np.isfinite(line.get_ydata()).tolist() == [math.isfinite(value) for value in values]
    (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert crosses.get_xdata().tolist() == [2, 5]
    (dots,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert dots.get_xydata().tolist() == [[6, 4]], "a line shows nothing of a single point"
    assert "no finite value" in to_svg(line_chart("t", [Curve("run", 0, [1], [math.nan])]))


@pytest.mark.parametrize(("better", "arrow"), [("higher", "\u25b2"), ("lower", "\u25bc")])
def test_the_better_direction_is_an_arrow_and_words(better: Any, arrow: str) -> None:
    drawing = line_chart("t", [Curve("r", 0, [1, 2], [1, 2])], better=better, unit="nats")
    assert {arrow, f"{better} is better  (nats)"} <= set(texts_of(drawing))
    assert f"{better} is better" in drawing.title


@pytest.mark.parametrize("value", [0.0, 0.09832935035228, -3.5])
def test_a_constant_curve_has_a_readable_scale(value: float) -> None:
    """matplotlib zoomed in to 1e-13, with labels of 18 characters over the next chart."""
    axes = axes_of(line_chart("loss", [Curve("run", 1, [1, 2], [value, value])]))
    axes.figure.draw_without_rendering()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert axes.yaxis.get_major_formatter().get_offset() == ""
    assert len(set(labels)) == len(labels) >= 2 and max(map(len, labels)) <= 7
    low, high = axes.get_ylim()
    assert low < value < high


def test_svg_is_well_formed_and_escapes() -> None:
    drawing = line_chart(HOSTILE, [Curve(HOSTILE, 0, [1, 2], [1, 2])], unit=HOSTILE)
    svg = to_svg(drawing)
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter() if element.text]
    assert texts.count(HOSTILE) == 3, "title, unit, and the label that is shown on hover"
    assert not [element for element in root.iter() if "script" in element.tag]


def test_svg_suits_a_page_with_several() -> None:
    """No ids to clash, no style for the whole page, nothing outside, colours by role only."""
    bars = stacked_bars("b", [("a", [1.0, 3.0])], ["p", "q"], unit="s")
    curves = [Curve("r", n, [1, 2], [n, math.nan]) for n in range(N_SERIES)]
    for drawing in (bars, line_chart("t", curves, better="lower")):
        svg = to_svg(drawing)
        # The shapes of markers are the same in every chart, and so are their ids.
        assert not re.findall(r'<g id="|<style|url\(|font-family: |#[0-9a-f]{6}', svg)
        used = set(re.findall(r"var\(--(\w+)\)", svg))
        assert used <= COLOURS.keys()
        assert all(f"--{role}:" in css_variables(dark=True) for role in used)


def test_every_role_has_a_light_and_a_dark_colour_that_stand_out() -> None:
    def luminance(colour: str) -> float:  # WCAG 2
        shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for role, pair in COLOURS.items():
        if role in ("paper", "grid"):
            continue
        for colour, paper in zip(pair, COLOURS["paper"], strict=True):
            light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3.0, role


def test_series_differ_in_colour_and_dashes() -> None:
    """Two roles with the same light colour need the same dark one: an SVG tells them by it."""
    series = [COLOURS[f"series{number}"] for number in range(N_SERIES)]
    assert len(set(series)) == len(set(DASHES)) == N_SERIES
    dark_of: dict[str, str] = {}
    for light, dark in COLOURS.values():
        assert dark_of.setdefault(light, dark) == dark


def test_a_heat_map_colours_cells_by_value_and_leaves_gaps() -> None:
    values = np.array([[0.0, 1.0, np.nan], [0.5, np.nan, np.nan]])
    drawing = heat_map(
        "h", values, x_edges=[0, 1, 2, 3], y_edges=[0, 8, 16], x_label="x", y_label="y"
    )
    axes = axes_of(drawing)
    (cells,) = axes.collections
    shown = cells.get_array().reshape(2, 3)
    assert shown.mask.tolist() == np.isnan(values).tolist()
    assert shown.compressed().tolist() == [0.0, 1.0, 0.5]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 3), (0, 16)), "row 0 is at the bottom"
    assert to_pixels(drawing, scale=1).shape == (300, 460, 3)


def test_bars_are_as_long_as_their_values() -> None:
    drawing = stacked_bars("b", [("a", [1.0, 3.0]), ("b", [2.0, 0.0])], ["p", "q"], unit="s")
    axes = axes_of(drawing)
    assert [[bar.get_width() for bar in part] for part in axes.containers] == [[1, 2], [3, 0]]
    assert [bar.get_x() for bar in axes.containers[1]] == [1, 2]
    assert axes.yaxis_inverted(), "the first run on top"
    assert {"25 %", "75 %", "4 s", "2 s", "p", "q", "a", "b"} <= set(texts_of(drawing))


def test_pngs_hold_all_drawings() -> None:
    def filled(colour: str) -> Drawing:
        return Drawing("d", lambda axes: axes.set_facecolor(colour), 100, 50, (0, 0, 0, 0))

    colours = [COLOURS[f"series{number}"][0] for number in range(3)]
    png = to_png([filled(colour) for colour in colours], columns=2, scale=2)
    image = Image.open(BytesIO(png)).convert("RGB")
    assert image.size == (400, 200)
    found = [image.getpixel(at) for at in ((100, 50), (300, 50), (100, 150))]
    assert ["#" + bytes(pixel).hex() for pixel in found] == colours
    assert image.getpixel((300, 150)) == (255, 255, 255)
    named = Image.open(BytesIO(to_png([filled("white")], legend=["one", "two"], scale=2)))
    assert named.size == (200, 160)


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"The page needs matplotlib.*extra 'plots'"):
        require_matplotlib("The page")
