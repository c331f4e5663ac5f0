"""What the log of a run says: its curves, which way is better, and whether they moved.

Plain lists of numbers in, plain numbers out: the console, the model card and the report share this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_ebft.training.metric_table import METRICS, Metric

Verdict = Literal["better", "worse", "no clear change"]

# Every structured run logs this, and no other.
STRUCTURED_ONLY = "ebft/ground_truth_length"
# The two ends of a curve that are compared: a fifth of its points each, at most so many.
END_SHARE = 0.2
LONGEST_END = 20
# With fewer points there is no estimate of the noise worth the name.
FEWEST_POINTS = 6
# A change counts from so many standard errors on.
STANDARD_ERRORS = 2.0
# Auto smoothing averages over about this share of a curve.
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
    """Both ends of a curve.

    Attributes:
        first, last: means over the first and the last points.
        noise: standard error of `last - first`; NaN if there are too few points to tell.
    """

    first: float
    last: float
    noise: float

    @property
    def difference(self) -> float:
        """How far the curve went."""
        return self.last - self.first

    @property
    def beyond_noise(self) -> bool:
        """Whether it went further than noise takes it; False if that is unknown."""
        return abs(self.difference) > STANDARD_ERRORS * self.noise

    def verdict(self, metric: Metric | None) -> Verdict | None:
        """In a word; None where no direction is good or the noise is unknown."""
        if metric is None or metric.better is None or math.isnan(self.noise):
            return None
        if not self.beyond_noise or abs(self.difference) < metric.matters:
            return "no clear change"
        return "better" if (self.difference > 0) == (metric.better == "higher") else "worse"


def series_of(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Curves by name, from `TrainerState.log_history`.

    Where a step was logged twice (a resumed run), the later entry counts.
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

    In structured mode `eval_loss` is GRPO's policy loss. It gets a name of its own, so that nobody
    takes it for the cross-entropy that it is in strided mode.
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

    The noise is judged by how much neighbours differ (von Neumann's estimate, half the mean square
    of successive differences), which a trend hardly touches.

    Raises:
        ValueError: no finite point.
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
    """Exponential moving average, corrected for its start; NaN and infinite points are passed over.

    Args:
        values: a curve.
        weight: of the past, 0 (no smoothing) to below 1. Default: an average over about a tenth of
            the curve.

    Returns:
        As many values; NaN before the first finite one.
    """
    if weight is None:
        span = max(1.0, len(values) * SMOOTHING_SHARE)
        weight = (span - 1) / (span + 1)
    if not 0.0 <= weight < 1.0:
        raise ValueError(f"A smoothing weight of {weight} is not in [0, 1); 0 does not smooth.")
    mean, mass, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            mass = weight * mass + (1 - weight)
        smoothed.append(mean / mass if mass else math.nan)
    return smoothed


def format_number(value: float) -> str:
    """A number for people: four digits, and 0 for what is 0 but for rounding."""
    if abs(value) < 1e-6:
        return "0"
    return f"{value:.4g}"


def changes(series: Mapping[str, Series]) -> dict[str, Change]:
    """Both ends of each curve that sums a run up, held-out metrics first."""
    summary = [metric.name for metric in METRICS if metric.in_summary]
    names = ["eval_loss", *(f"eval_{name}" for name in summary), *summary]
    return {
        name: ends(series[name])
        for name in names
        if name in series and len(series[name].finite()) > 1
    }
