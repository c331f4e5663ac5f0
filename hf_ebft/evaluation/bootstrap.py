"""Confidence intervals of means, and of differences, by bootstrap over documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Largest number of resamples times groups drawn at once; bounds the memory.
CHUNK = 4_000_000
# Differences below this count as rounding: measurements are of order 1, in float32.
ROUNDING = 1e-6


@dataclass(frozen=True)
class PairedDifference:
    """A measurement before and after, and the interval of its change.

    Attributes:
        before, after: means over the documents that have the measurement in both.
        difference: `after - before`.
        low, high: bounds of the bootstrap interval of the difference.
        n_documents: number of documents used.
        n_groups: number of resampled groups.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    n_documents: int
    n_groups: int

    @property
    def beyond_noise(self) -> bool:
        """Whether zero is outside the interval, up to rounding errors of float32."""
        return self.low > ROUNDING or self.high < -ROUNDING


@dataclass(frozen=True)
class Interval:
    """A mean over documents and its bootstrap interval.

    Attributes:
        mean: mean over the documents that have the measurement.
        low, high: bounds of the interval.
        n_documents: number of documents used.
        n_groups: number of resampled groups.
    """

    mean: float
    low: float
    high: float
    n_documents: int
    n_groups: int


def mean_bootstrap(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Bootstrap of a mean over documents; see `paired_bootstrap` for the kind of interval.

    Args:
        values: (N,) measurements; NaN for a document without one.
        weights: (N,) weights of the documents, such as their numbers of tokens. Default: equal.
        groups: (N,) labels of groups that are resampled as a whole.
        n_resamples: number of bootstrap resamples.
        confidence: level of the interval.
        seed: seed of the resampling.

    Raises:
        ValueError: shapes differ, fewer than two groups have a measurement, or an argument is out
            of range.
    """
    paired = paired_bootstrap(
        np.zeros_like(np.asarray(values, dtype=np.float64)),
        values,
        weights=weights,
        groups=groups,
        n_resamples=n_resamples,
        confidence=confidence,
        seed=seed,
    )
    return Interval(paired.after, paired.low, paired.high, paired.n_documents, paired.n_groups)


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Bootstrap of the mean difference, with documents (or groups of them) resampled.

    The interval is the expanded percentile interval (T. Hesterberg, "What teachers should know
    about the bootstrap", 2015), which is corrected for few groups. The plain percentile interval of
    12 groups is a seventh narrower, and covers the truth 91 times in 100 instead of 95.

    Args:
        before: (N,) measurements; NaN for a document without one.
        after: (N,) measurements of the same documents.
        weights: (N,) weights of the documents, such as their numbers of tokens. Default: equal.
        groups: (N,) labels of groups that are resampled as a whole, such as the file that rows were
            cut from. Neighbouring rows resemble each other; treated as independent, they would make
            the interval too narrow. Default: every document is a group.
        n_resamples: number of bootstrap resamples.
        confidence: level of the interval.
        seed: seed of the resampling.

    Raises:
        ValueError: shapes differ, fewer than two groups have a measurement, or an argument is out
            of range.
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    labels = np.arange(old.size) if groups is None else np.asarray(groups)
    weight = np.ones(old.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    if not old.shape == new.shape == labels.shape == weight.shape or old.ndim != 1:
        raise ValueError(
            f"before, after, groups and weights must be of one shape (documents,), not "
            f"{old.shape}, {new.shape}, {labels.shape} and {weight.shape}: measure both on the "
            "same rows."
        )
    if n_resamples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"n_resamples={n_resamples} must be at least 1 and confidence={confidence} between 0 "
            "and 1; 10000 and 0.95 are usual."
        )
    paired = ~(np.isnan(old) | np.isnan(new))
    old, new, weight = old[paired], new[paired], weight[paired]
    _, group = np.unique(labels[paired], return_inverse=True)
    sizes = np.bincount(group, weights=weight).astype(np.float64)
    if len(sizes) < 2:
        raise ValueError(
            f"There are {len(old)} documents in {len(sizes)} group(s) with a measurement before "
            "and after; an interval needs at least 2 groups. Evaluate on more text."
        )
    sums = np.bincount(group, weights=weight * (new - old)).astype(np.float64)
    means = _resampled_means(sums, sizes, n_resamples, np.random.default_rng(seed))
    tail = _expanded_tail((1 - confidence) / 2, len(sizes))
    low, high = np.quantile(means, [tail, 1 - tail])
    return PairedDifference(
        before=float(np.average(old, weights=weight)),
        after=float(np.average(new, weights=weight)),
        difference=float(np.average(new - old, weights=weight)),
        low=float(low),
        high=float(high),
        n_documents=len(old),
        n_groups=len(sizes),
    )


def _expanded_tail(tail: float, n_groups: int) -> float:
    """The tail probability of the resampled means at which the interval ends.

    Resampled means vary less than means, by sqrt((n - 1) / n), and their quantiles are like those
    of a normal distribution instead of Student's. This corrects for both.
    """
    z = -NormalDist().inv_cdf(tail)
    freedom = n_groups - 1
    # Student's quantile by its expansion in 1 / freedom. For 95 % it is 1 % too small with 5
    # degrees, 4 % with 3 and 10 % with 2.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return NormalDist().cdf(-math.sqrt(n_groups / freedom) * t)


def _resampled_means(
    sums: NDArray[np.float64],
    sizes: NDArray[np.float64],
    n_resamples: int,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """(n_resamples,) means over groups that are drawn with replacement.

    The numbers of draws of the groups are multinomial, so a resample is a vector of counts.
    """
    n_groups = len(sums)
    equal = np.full(n_groups, 1 / n_groups)
    means = []
    for first in range(0, n_resamples, max(1, CHUNK // n_groups)):
        size = min(max(1, CHUNK // n_groups), n_resamples - first)
        counts = generator.multinomial(n_groups, equal, size=size)
        means.append((counts @ sums) / (counts @ sizes))
    return np.concatenate(means)
