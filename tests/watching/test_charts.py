"""Charts: that what is drawn is where the numbers are, and that text stays text."""

import math
import xml.etree.ElementTree as ElementTree
from io import BytesIO

import numpy as np
import pytest

from hf_ebft.watching.charts import (
    COLOURS,
    Curve,
    Drawing,
    Line,
    Polygon,
    Text,
    heat_colour,
    heat_map,
    line_chart,
    rectangle,
    side_by_side,
    stacked_bars,
    tick_labels,
    ticks,
    to_image,
    to_png,
    to_svg,
)

HOSTILE = "<script>alert(1)</script> & \"'"


def lines_of(drawing: Drawing, role: str) -> list[Line]:
    return [s for s in drawing.shapes if isinstance(s, Line) and s.role == role]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3.0, 17.0), (1e-7, 3e-7), (5.0, 5.0), (0.0, 0.0), (1e9, 3e9)]
)
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    places = ticks(low, high, 5)
    assert 2 <= len(places) <= 8
    assert places[0] <= low + 1e-9 * abs(low)
    assert places[-1] >= high - 1e-9 * abs(high)
    steps = np.diff(places)
    assert steps == pytest.approx(np.full(len(steps), steps[0]))
    leading = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(leading - digit) for digit in (1, 2, 5, 10)) < 1e-6
    labels = tick_labels(places)
    assert len(set(labels)) == len(labels)
    assert [float(label) for label in labels] == pytest.approx(places, rel=1e-3, abs=1e-12)


def test_points_lie_where_their_values_are() -> None:
    drawing = line_chart("t", [Curve("run", 0, [0, 5, 10], [0.0, 1.0, 0.5])])
    (line,) = lines_of(drawing, "series0")
    (x0, y0), (x1, y1), (x2, y2) = line.points
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(2 * (y0 - y2)), "up is more"


def test_gaps_break_lines_and_are_marked() -> None:
    values = [0.0, 1.0, math.nan, 2.0, 3.0, math.inf]
    drawing = line_chart("t", [Curve("run", 1, range(6), values)])
    assert [len(line.points) for line in lines_of(drawing, "series1")] == [2, 2]
    crosses = {line.points[0] for line in lines_of(drawing, "bad")}
    assert len(crosses) == 4, "two strokes at each of two gaps"
    assert "no finite value" in to_svg(line_chart("t", [Curve("run", 0, [1], [math.nan])]))


@pytest.mark.parametrize(("better", "rises"), [("higher", True), ("lower", False)])
def test_the_better_direction_is_an_arrow_and_words(better: str, rises: bool) -> None:
    drawing = line_chart("t", [Curve("r", 0, [1, 2], [1, 2])], better=better)  # type: ignore[arg-type]
    (arrow,) = [s for s in drawing.shapes if isinstance(s, Polygon) and s.role == "good"]
    tip, base = arrow.points[2][1], arrow.points[0][1]
    assert (tip < base) == rises
    assert any(isinstance(s, Text) and s.text == f"{better} is better" for s in drawing.shapes)
    assert f"{better} is better" in drawing.title


def test_svg_is_well_formed_and_escapes() -> None:
    drawing = line_chart(HOSTILE, [Curve(HOSTILE, 0, [1, 2], [1, 2])], unit=HOSTILE)
    root = ElementTree.fromstring(to_svg(drawing))
    texts = [element.text for element in root.iter() if element.text]
    assert HOSTILE in texts
    assert not [element for element in root.iter() if "script" in element.tag]


def test_every_role_has_a_light_and_a_dark_colour_that_stand_out() -> None:
    def luminance(rgb: tuple[int, int, int]) -> float:  # WCAG 2
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for role, pair in COLOURS.items():
        if role in ("paper", "grid"):
            continue
        for colour, paper in zip(pair, COLOURS["paper"], strict=True):
            light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3.0, role


def test_a_png_shows_the_shapes() -> None:
    drawing = Drawing(40, 20, "d", [rectangle(10, 5, 20, 10, "series1")])
    image = pytest.importorskip("PIL.Image").open(BytesIO(to_png(drawing, scale=2))).convert("RGB")
    assert image.size == (80, 40)
    assert image.getpixel((40, 20)) == COLOURS["series1"][0]
    assert image.getpixel((4, 4)) == COLOURS["paper"][0]


def test_a_dashed_line_has_its_share_of_ink() -> None:
    drawing = Drawing(200, 20, "d", [Line(((0, 10), (200, 10)), "ink", 4, dash=(10, 30))])
    row = np.asarray(to_image(drawing, scale=1))[10, :, 0]
    assert np.mean(row < 128) == pytest.approx(0.25, abs=0.03)
    svg = to_svg(drawing)
    assert 'stroke-dasharray="10 30"' in svg


def test_a_heat_map_colours_cells_by_value_and_leaves_gaps() -> None:
    values = np.array([[0.0, 1.0, np.nan], [0.5, np.nan, np.nan]])
    drawing = heat_map(
        "h", values, x_edges=[0, 1, 2, 3], y_edges=[0, 8, 16], x_label="x", y_label="y"
    )
    cells = [s for s in drawing.shapes if isinstance(s, Polygon) and s.rgb][:3]
    assert [cell.rgb for cell in cells] == [heat_colour(0), heat_colour(1), heat_colour(0.5)]
    assert cells[0].points[0][1] > cells[2].points[0][1], "row 0 is at the bottom"
    lightness = [sum(heat_colour(share / 20)) for share in range(21)]
    assert lightness == sorted(lightness), "readable in grey"


def test_bars_are_as_long_as_their_values() -> None:
    drawing = stacked_bars("b", [("a", [1.0, 3.0]), ("b", [2.0, 0.0])], ["p", "q"], unit="s")
    bars = [s for s in drawing.shapes if isinstance(s, Polygon) and s.label]
    wide = [bar.points[1][0] - bar.points[0][0] for bar in bars]
    assert [value / wide[0] for value in wide] == pytest.approx([1, 3, 2, 0])
    assert any(isinstance(s, Text) and s.text == "75 %" for s in drawing.shapes)


def test_drawings_side_by_side_keep_apart() -> None:
    one = Drawing(100, 50, "one", [Text((1, 2), "x"), rectangle(0, 0, 10, 10)])
    grid = side_by_side([one, one, one], columns=2, gap=10)
    assert (grid.width, grid.height) == (210, 110)
    assert [s.at for s in grid.shapes if isinstance(s, Text)] == [(1, 2), (111, 2), (1, 62)]
