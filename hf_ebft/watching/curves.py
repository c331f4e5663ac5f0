"""Analyses the log of a run: its curves, the better direction, and whether they changed.

Plain lists of numbers in, plain numbers out. The console, the model card and the report use this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_ebft.training.metric_table import METRICS, Metric

Verdict = Literal["better", "worse", "no clear change"]

# Logged by every structured run, and by no other.
STRUCTURED_ONLY = "ebft/ground_truth_length"
# The two ends of a curve that are compared: a fifth of its points each, at most this many.
END_SHARE = 0.2
LONGEST_END = 20
# With fewer points, the noise cannot be estimated.
FEWEST_POINTS = 6
# A change is beyond the noise from this many standard errors on.
STANDARD_ERRORS = 2.0
# The default smoothing averages over about this share of a curve.
SMOOTHING_SHARE = 0.1


@dataclass(frozen=True)
class Series:
    """A curve: values at optimizer steps, in order. Values may be NaN or infinite."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def finite(self) -> Series:
        """The curve without its NaN and infinite points."""
        kept = [
            (step, value)
            for step, value in zip(self.steps, self.values, strict=True)
            if math.isfinite(value)
        ]
        return Series(tuple(step for step, _ in kept), tuple(value for _, value in kept))

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Change:
    """The first and the last part of a curve, compared.

    Attributes:
        first, last: means over the first and the last points.
        noise: standard error of `last - first`; NaN if there are too few points.
    """

    first: float
    last: float
    noise: float

    @property
    def difference(self) -> float:
        """The change of the curve, `last - first`."""
        return self.last - self.first

    @property
    def beyond_noise(self) -> bool:
        """Whether the change is larger than noise explains; False if the noise is unknown."""
        return abs(self.difference) > STANDARD_ERRORS * self.noise

    def verdict(self, metric: Metric | None) -> Verdict | None:
        """The change in words; None if no direction is better or the noise is unknown."""
        if metric is None or metric.better is None or math.isnan(self.noise):
            return None
        if not self.beyond_noise or abs(self.difference) < metric.matters:
            return "no clear change"
        return "better" if (self.difference > 0) == (metric.better == "higher") else "worse"


def series_of(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Curves by name, from `TrainerState.log_history`.

    If a step was logged twice (in a resumed run), the later entry is used.
    """
    points: dict[str, dict[int, float]] = {}
    for entry in log_history:
        if "step" not in entry:
            continue
        for name, value in entry.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            points.setdefault(name, {})[int(entry["step"])] = float(value)
    return curves_of(points)


def curves_of(points: Mapping[str, Mapping[int, float]]) -> dict[str, Series]:
    """Curves from the points of each name, step -> value.

    In structured mode `eval_loss` is GRPO's policy loss. It gets another name here, since in
    strided mode `eval_loss` is the cross-entropy.
    """
    if STRUCTURED_ONLY in points and "eval_loss" in points:
        points = {
            "eval_policy_loss" if name == "eval_loss" else name: by_step
            for name, by_step in points.items()
        }
    return {
        name: Series(tuple(sorted(by_step)), tuple(by_step[step] for step in sorted(by_step)))
        for name, by_step in points.items()
        if by_step
    }


def ends(series: Series) -> Change:
    """Compare the first fifth of a curve with its last fifth.

    The noise is estimated from differences between neighbours (von Neumann's estimate, half the
    mean square of successive differences), which a trend hardly affects.

    Raises:
        ValueError: the curve has no finite point.
    """
    values = series.finite().values
    count = len(values)
    if count == 0:
        raise ValueError("The curve has no finite point, so it has no ends to compare.")
    width = max(1, min(LONGEST_END, int(count * END_SHARE)))
    first, last = math.fsum(values[:width]) / width, math.fsum(values[-width:]) / width
    if count < FEWEST_POINTS:
        return Change(first, last, math.nan)
    squares = math.fsum((b - a) ** 2 for a, b in itertools.pairwise(values))
    variance = squares / (2 * (count - 1))
    return Change(first, last, math.sqrt(2 * variance / width))


def smooth(values: Sequence[float], weight: float | None = None) -> list[float]:
    """Exponential moving average, corrected for its start; points that are not finite are skipped.

    Args:
        values: a curve.
        weight: weight of the past, from 0 (no smoothing) to below 1. Default: an average over about
            a tenth of the curve.

    Returns:
        As many values; NaN before the first finite one.
    """
    if weight is None:
        span = max(1.0, len(values) * SMOOTHING_SHARE)
        weight = (span - 1) / (span + 1)
    if not 0.0 <= weight < 1.0:
        raise ValueError(f"smoothing={weight} must be at least 0 (no smoothing) and below 1.")
    mean, mass, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            mass = weight * mass + (1 - weight)
        smoothed.append(mean / mass if mass else math.nan)
    return smoothed


def format_number(value: float) -> str:
    """A number with four digits; 0 for values that are 0 up to rounding."""
    if abs(value) < 1e-6:
        return "0"
    return f"{value:.4g}"


def changes(series: Mapping[str, Series]) -> dict[str, Change]:
    """Changes of the main curves of a run, held-out metrics first."""
    summary = [metric.name for metric in METRICS if metric.in_summary]
    names = ["eval_loss", *(f"eval_{name}" for name in summary), *summary]
    return {
        name: ends(series[name])
        for name in names
        if name in series and len(series[name].finite()) > 1
    }
