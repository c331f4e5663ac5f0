"""Renders the report as one self-contained HTML page: no script, no network, inline SVG.

The template is `page.html.jinja`. jinja2 escapes every text that comes from a run; matplotlib
escapes those in charts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_ebft.config import EBFTSettings
from hf_ebft.report.health import examine
from hf_ebft.report.plots import charts_of, timing_chart
from hf_ebft.report.runs import Run, Watched
from hf_ebft.report.template import render
from hf_ebft.training.metric_table import HELD_OUT_METRICS, label_of, metric_of
from hf_ebft.watching.charts import DASHES, to_svg
from hf_ebft.watching.curves import Change, changes, format_number
from hf_ebft.watching.model_card import ARGUMENTS

# Shown of a watched prefix: its last characters, and its rollouts at this many steps.
PREFIX_CHARACTERS = 160
MOST_LOOKS = 8


def render_page(
    runs: Sequence[Run], title: str = "EBFT runs", smoothing: float | None = None
) -> str:
    """Render the page of one or several runs.

    Args:
        runs: the runs, in the order in which they are listed.
        title: title of the page.
        smoothing: weight of the past in the smoothed curves. Default: about a tenth of a curve.

    Raises:
        ValueError: there are no runs, or more than colours, or a weight is out of range.
        ImportError: matplotlib is not installed.
    """
    if not runs:
        raise ValueError("There is no run to report on; name one or more.")
    timing = timing_chart(runs)
    settings, other_arguments = _arguments(runs)
    charts = [
        {"svg": to_svg(chart.drawing), "meaning": chart.metric.meaning.replace("`", "")}
        for chart in charts_of(runs, smoothing)
    ]
    return render(
        "page.html.jinja",
        title=title,
        runs=runs,
        dashes=DASHES,
        findings=[(run, examine(run)) for run in runs],
        changes=_changes(runs),
        comparisons=_with_content(runs, _comparison),
        charts=charts,
        timing=None if timing is None else to_svg(timing),
        samples=_with_content(runs, lambda run: [dataclasses.asdict(s) for s in run.samples]),
        watched=_with_content(runs, _watched),
        settings=settings,
        other_arguments=other_arguments,
    )


def _with_content(
    runs: Sequence[Run], content: Callable[[Run], list[Any]]
) -> list[tuple[Run, list[Any]]]:
    """The runs that have a kind of content, with that content."""
    return [(run, found) for run in runs if (found := content(run))]


def _changes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of the table of first and last values of the curves, with a cell for each run."""
    by_run = [changes(run.series) for run in runs]
    return [
        {"label": label_of(name), "cells": [_change(found.get(name), name) for found in by_run]}
        for name in dict.fromkeys(name for found in by_run for name in found)
    ]


def _change(change: Change | None, name: str) -> dict[str, str]:
    if change is None:
        return {"ends": "", "kind": "", "verdict": ""}
    verdict = change.verdict(metric_of(name)) or ""
    return {
        "ends": f"{format_number(change.first)} → {format_number(change.last)}",
        "kind": verdict if verdict in ("better", "worse") else "muted",
        "verdict": verdict,
    }


def _comparison(run: Run) -> list[dict[str, Any]]:
    """Rows of held-out metrics; other entries of report.json are left out."""
    wanted = ("before", "after", "difference", "low", "high")
    rows: list[dict[str, Any]] = []
    for name, values in run.comparison.items():
        if isinstance(values, dict) and all(
            isinstance(values.get(key), (int, float)) for key in wanted
        ):
            metric = HELD_OUT_METRICS.get(name)
            label = name if metric is None else metric.label
            rows.append({"label": label} | {key: float(values[key]) for key in wanted})
    return rows


def _watched(run: Run) -> list[dict[str, Any]]:
    by_prefix: dict[tuple[str, str], list[Watched]] = {}
    for look in run.watched:
        by_prefix.setdefault((look.prefix, look.ground_truth), []).append(look)
    return [
        {"prefix": prefix[-PREFIX_CHARACTERS:], "truth": truth, "looks": _spread(looks)}
        for (prefix, truth), looks in by_prefix.items()
    ]


def _spread(seen: Sequence[Watched]) -> list[Watched]:
    """The first, the last, and some in between."""
    if len(seen) <= MOST_LOOKS:
        return list(seen)
    last = len(seen) - 1
    return [seen[round(number * last / (MOST_LOOKS - 1))] for number in range(MOST_LOOKS)]


def _arguments(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the most important settings, and of all others."""
    everything = sorted({name for run in runs for name in run.arguments})
    settings = [field.name for field in dataclasses.fields(EBFTSettings)]
    named = [*settings, *ARGUMENTS, "max_steps", "num_train_epochs"]
    main = [name for name in named if name in everything]
    rest = [name for name in everything if name not in main]
    return [_argument(runs, name) for name in main], [_argument(runs, name) for name in rest]


def _argument(runs: Sequence[Run], name: str) -> dict[str, Any]:
    """A row; bold if the runs differ, or if a single run differs from EBFT's default."""
    values = [run.arguments.get(name, "") for run in runs]
    if len(runs) == 1:
        defaults = dataclasses.asdict(EBFTSettings())
        stands_out = name in defaults and values[0] != defaults[name]
    else:
        stands_out = any(value != values[0] for value in values)
    cells = [{"text": _value(value), "stands_out": stands_out} for value in values]
    return {"name": name, "cells": cells}


def _value(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return "" if isinstance(value, Mapping) and not value else str(value)
