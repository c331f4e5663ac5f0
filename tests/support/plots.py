"""What charts draw, read from matplotlib's own objects."""

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from hf_ebft.watching.charts import COLOURS, Drawing


def axes_of(drawing: Drawing) -> Axes:
    """The axes that a drawing was drawn on."""
    axes = Figure().add_subplot()
    drawing.draw(axes)
    return axes


def curves_of(axes: Axes, series: int) -> list[Line2D]:
    """The lines of a series; markers alone are none."""
    colour = COLOURS[f"series{series}"][0]
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    return [line for line in lines if to_hex(line.get_color()) == colour]


def texts_of(drawing: Drawing) -> list[str]:
    """Every text of a drawing."""
    axes = axes_of(drawing)
    axes.figure.draw_without_rendering()
    return [text.get_text() for text in axes.findobj(Text) if text.get_text()]
