"""Charts of one or several runs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_ebft.report.runs import Run
from hf_ebft.training.metric_table import METRICS, PHASES, Metric, label_of, metric_of
from hf_ebft.watching.charts import (
    N_SERIES,
    Curve,
    Drawing,
    line_chart,
    stacked_bars,
    to_png,
)
from hf_ebft.watching.curves import Series, smooth

# Largest number of points of a drawn curve; more cannot be seen, and make pages large.
MOST_POINTS = 400
# Curves with at most this many points get dots.
FEW_POINTS = 24
PHASE_NAMES = ("rollout", "features", "training")
# Curves without noise.
EXACT = ("learning_rate",)
# The overview picture shows the first six of these that a run has.
OVERVIEW = (
    "eval_loss",
    "eval_ebft/cfm_loss",
    *(metric.name for metric in METRICS if metric.in_overview),
)
# `Trainer`'s own metrics that are not about learning.
UNINTERESTING = ("epoch", "total_flos", "train_loss", "step")
TIMING = ("runtime", "per_second", "preparation_time")


@dataclass(frozen=True)
class Chart:
    """The chart of a metric.

    Attributes:
        name: name of the metric in the log.
        metric: its description; for a name that is not in our table, a generic one.
        drawing: the picture.
    """

    name: str
    metric: Metric
    drawing: Drawing

    @property
    def file_name(self) -> str:
        """Name of the chart's PNG file."""
        return re.sub(r"[^\w.-]", "_", self.name) + ".png"


def charts_of(runs: Sequence[Run], smoothing: float | None = None) -> list[Chart]:
    """One chart per metric that any run has: held-out metrics first, then the most informative.

    Each run keeps its colour and dashes in all charts. Raw points are drawn pale behind their
    exponential moving average; curves with few points are drawn unsmoothed.

    Args:
        runs: at most `N_SERIES` runs.
        smoothing: weight of the past, see `hf_ebft.watching.curves.smooth`.

    Raises:
        ValueError: there are more runs than colours, or a weight is out of range.
    """
    if len(runs) > N_SERIES:
        raise ValueError(
            f"{len(runs)} runs are more than there are colours for one chart; show at most "
            f"{N_SERIES} at a time."
        )
    charts = []
    for name in _names(runs):
        metric = metric_of(name) or Metric(name, name, meaning="A metric of your own.", mode=None)
        curves: list[Curve] = []
        for number, run in enumerate(runs):
            if name in run.series:
                curves += _curves(run, number, name, smoothing)
        drawing = line_chart(label_of(name), curves, better=metric.better, unit=metric.unit)
        charts.append(Chart(name, metric, drawing))
    return charts


def timing_chart(runs: Sequence[Run]) -> Drawing | None:
    """Mean seconds of a micro-batch by phase, one bar per run; None if no run logged them."""
    bars = []
    for run in runs:
        spent = [run.series[name].finite().values for name in PHASES if name in run.series]
        if len(spent) == len(PHASES) and all(spent):
            bars.append((run.name, [math.fsum(values) / len(values) for values in spent]))
    if not bars:
        return None
    return stacked_bars("Time of a micro-batch by phase", bars, PHASE_NAMES, unit="s")


def write_pngs(
    runs: Sequence[Run], folder: str | Path, smoothing: float | None = None
) -> list[Path]:
    """Write a PNG per metric, `timing.png`, and `overview.png` with the most informative ones.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    charts = charts_of(runs, smoothing)
    legend = [run.name for run in runs] if len(runs) > 1 else []
    pictures = {chart.file_name: to_png([chart.drawing], legend=legend) for chart in charts}
    timing = timing_chart(runs)
    if timing is not None:
        pictures["timing.png"] = to_png([timing])
    shown = [chart.drawing for chart in charts if chart.name in OVERVIEW][:6]
    if shown:
        pictures["overview.png"] = to_png(shown, columns=3, legend=legend)
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    return [folder / name for name in pictures]


def _names(runs: Sequence[Run]) -> list[str]:
    """Logged names in the order in which they are shown."""
    known = [metric.name for metric in METRICS if metric.name not in PHASES]
    ordered = ["eval_loss", *(f"eval_{name}" for name in known[:5] if name != "loss"), *known]
    rest = sorted({name for run in runs for name in run.series} - set(ordered) - set(PHASES))
    own = [
        name
        for name in rest
        # The evaluation of a diagnostic shows the same as its training curve.
        if not (name.startswith("eval_ebft/") or name in UNINTERESTING or name.endswith(TIMING))
    ]
    names = [*ordered, *own]
    return [name for name in names if any(name in run.series for run in runs)]


def _curves(run: Run, number: int, name: str, smoothing: float | None) -> list[Curve]:
    series = run.series[name]
    if name in EXACT:
        thin = _thin(series)
        return [Curve(run.name, number, thin.steps, thin.values)]
    if len(series) <= FEW_POINTS and smoothing is None:
        return [Curve(run.name, number, series.steps, series.values, marked=True)]
    smoothed = Series(series.steps, tuple(smooth(series.values, smoothing)))
    raw, line = _thin(series), _thin(smoothed)
    return [
        Curve(run.name, number, raw.steps, raw.values, faint=True),
        # At a gap in the raw curve, the average would hide the gap with a straight line.
        Curve(run.name, number, line.finite().steps, line.finite().values),
    ]


def _thin(series: Series) -> Series:
    """Fewer points, including the extremes of each stretch and all points that are not finite."""
    if len(series) <= MOST_POINTS:
        return series
    kept: list[int] = []
    stretch = math.ceil(2 * len(series) / MOST_POINTS)
    for first in range(0, len(series), stretch):
        places = range(first, min(first + stretch, len(series)))
        finite = [place for place in places if math.isfinite(series.values[place])]
        chosen = set(places) - set(finite)
        if finite:
            chosen.add(min(finite, key=lambda place: series.values[place]))
            chosen.add(max(finite, key=lambda place: series.values[place]))
        kept += sorted(chosen)
    return Series(
        tuple(series.steps[place] for place in kept), tuple(series.values[place] for place in kept)
    )
