"""How much of a gradient is noise: the noise scale, and cosines that are not biased by noise.

With g_i the gradient of document i, G its expectation and Sigma its covariance, the mean over B
documents has expected square |G|^2 + tr(Sigma) / B. The noise scale tr(Sigma) / |G|^2 (S.
McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv 1812.06162, eq. 2.9) is
the number of documents in a step at which signal and noise are equal. Steps of smaller batches are
mostly noise; much larger batches waste documents.

All estimates are computed from dot products of gradients, so that a gradient can be dropped once
its products are known. Dimension letters: N gradients, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval over documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class NoiseScale:
    """Signal and noise of the gradient of one document.

    Attributes:
        signal: |G|^2, estimated without bias; it can be below zero if there is hardly any signal.
        noise: tr(Sigma), estimated without bias.
        documents: the noise scale `noise / signal`, in documents; infinite if `signal` is not above
            0.
        low, high: confidence interval of the noise scale; `high` is infinite if the signal cannot
            be distinguished from zero with these documents.
        n_gradients: N.
    """

    signal: float
    noise: float
    documents: float
    low: float
    high: float
    n_gradients: int


def gradient_products(gradients: Tensor | Iterable[Tensor], *, chunk: int = 2**20) -> Tensor:
    """Dot products of all pairs of gradients.

    Args:
        gradients: (N, P), or N tensors (P,); any floating dtype.
        chunk: number of entries of a gradient that exist in float64 at once.

    Returns:
        (N, N) float64.
    """
    rows = gradients if isinstance(gradients, Tensor) else torch.stack(list(gradients))
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(chunk, dim=1):
        wide = part.to("cpu", torch.float64)
        products += wide @ wide.T
    return products


def noise_scale(
    products: Tensor, *, documents_per_gradient: int = 1, confidence: float = 0.95
) -> NoiseScale:
    """Signal, noise and noise scale from the products of independent gradients.

        |G|^2     = mean over pairs i != j of g_i . g_j
        tr(Sigma) = mean of g_i . g_i - |G|^2           (times the documents of a gradient)

    The interval is the inverse of the jackknife's interval for signal / noise. The noise is known
    well, but the signal may be compatible with zero, and then the noise scale has no upper bound.
    If there is hardly any signal, the jackknife's standard error is up to sqrt(2) times too large
    (B. Efron and C. Stein, "The jackknife estimate of variance", 1981), so the interval is too
    wide rather than too narrow.

    Args:
        products: (N, N) dot products of N >= 3 independent gradients.
        documents_per_gradient: number of documents that each gradient is the mean of.
        confidence: level of the interval.

    Raises:
        ValueError: the matrix is not square, there are fewer than three gradients, or another
            argument is out of range.
    """
    _check_products(products, "products")
    if documents_per_gradient < 1:
        raise ValueError(
            f"documents_per_gradient={documents_per_gradient} must be at least 1: write the number "
            "of documents that each gradient is the mean of"
        )
    signal, without_signal = _pair_means(products)
    noise, without_noise = _noise(products)
    ratio = _jackknife(signal / noise, [without_signal / without_noise], confidence)
    inverted = (ratio.value, ratio.high, ratio.low)  # inversion swaps the bounds
    scaled = Estimate(*(documents_per_gradient * _inverse(x) for x in inverted))
    return NoiseScale(
        signal=float(signal),
        noise=documents_per_gradient * float(noise),
        documents=scaled.value,
        low=scaled.low,
        high=scaled.high,
        n_gradients=len(products),
    )


def noise_ratio(products: Tensor, other: Tensor, *, confidence: float = 0.95) -> Estimate:
    """Ratio of tr(Sigma) of two estimators of the gradient.

    If both estimate the same gradient, this is the ratio of their noise scales, and it is known far
    better than either of them.

    Args:
        products: (N, N) dot products of one estimator's gradients.
        other: (N, N) dot products of the other one's, on the same N >= 3 documents. For N other
            documents the interval is valid as well, but wider.
        confidence: level of the jackknife's interval.

    Raises:
        ValueError: the matrices do not fit, or there are fewer than three documents.
    """
    _check_products(products, "products")
    _check_products(other, "other")
    if products.shape != other.shape:
        raise ValueError(
            f"products {tuple(products.shape)} and other {tuple(other.shape)} must have the same "
            "shape: compute both on the same documents"
        )
    (noise, without), (base, base_without) = _noise(products), _noise(other)
    return _jackknife(noise / base, [without / base_without], confidence)


def gradient_cosine(
    products: Tensor,
    other: Tensor,
    cross: Tensor,
    *,
    same_documents: bool,
    confidence: float = 0.95,
) -> Estimate:
    """Cosine between the expectations of two kinds of gradients.

    The cosine of two sample means is too small, since noise enlarges their norms but not their
    product. Here all three products are unbiased. Two estimators of one gradient therefore have
    cosine 1 on average, and a single estimate can be above 1.

    Args:
        products: (N, N) dot products of gradients of the first kind.
        other: (M, M) dot products of gradients of the second kind.
        cross: (N, M) dot products of the first kind with the second.
        same_documents: whether gradients i of both kinds share their noise, as two gradients of one
            document do; then N = M and the diagonal of `cross` is left out.
        confidence: level of the jackknife's interval.

    Returns:
        The cosine with its interval; NaN if a signal is not above zero.

    Raises:
        ValueError: the matrices do not fit, or there are fewer than three gradients of a kind.
    """
    _check_products(products, "products")
    _check_products(other, "other")
    if tuple(cross.shape) != (len(products), len(other)):
        raise ValueError(
            f"cross must have shape {(len(products), len(other))}, got {tuple(cross.shape)}"
        )
    if same_documents and len(products) != len(other):
        raise ValueError(
            f"same_documents=True needs equally many gradients of both kinds, got {len(products)} "
            f"and {len(other)}"
        )
    (first, without_first), (second, without_second) = _pair_means(products), _pair_means(other)
    cross = cross.double()
    n, m = cross.shape
    if same_documents:
        both = (cross + cross.T) / 2  # its pairs of different documents have the same mean
        product, without = _pair_means(both)
        value = _cosine(product, first, second)
        left_out = [_cosine(without, without_first, without_second)]
    else:
        total = cross.sum()
        value = _cosine(total / (n * m), first, second)
        rows = (total - cross.sum(dim=1)) / ((n - 1) * m)
        columns = (total - cross.sum(dim=0)) / (n * (m - 1))
        left_out = [_cosine(rows, without_first, second), _cosine(columns, first, without_second)]
    return _jackknife(value, left_out, confidence)


def _check_products(products: Tensor, name: str) -> None:
    if products.dim() != 2 or products.shape[0] != products.shape[1] or len(products) < 3:
        raise ValueError(
            f"{name} must be (N, N), the dot products of N >= 3 gradients with each other, got "
            f"{tuple(products.shape)}"
        )


def _pair_means(products: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over pairs of different gradients: over all, and (N,) without each gradient in turn."""
    products = products.double()
    n, own, row = len(products), products.diagonal(), products.sum(dim=1)
    pairs = products.sum() - own.sum()
    return pairs / (n * (n - 1)), (pairs - 2 * (row - own)) / ((n - 1) * (n - 2))


def _noise(products: Tensor) -> tuple[Tensor, Tensor]:
    """tr(Sigma) of one gradient: from all gradients, and (N,) without each in turn."""
    signal, without_signal = _pair_means(products)
    squares = products.double().diagonal()
    total, n = squares.sum(), len(products)
    return total / n - signal, (total - squares) / (n - 1) - without_signal


def _cosine(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
    # The root of a negative signal is NaN, as documented. One root of the product of both signals
    # would be wrong: if both are negative, their product is positive.
    return product / (first.sqrt() * second.sqrt())


def _jackknife(value: Tensor, left_out: list[Tensor], confidence: float) -> Estimate:
    """A confidence interval from the values with one document left out.

    Args:
        value: the estimate from all documents.
        left_out: for each independent sample of documents, (N,) estimates without each of them.
        confidence: level of the interval.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    variance = sum(
        (len(values) - 1) / len(values) * float((values - values.mean()).square().sum())
        for values in left_out
    )
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return Estimate(float(value), float(value) - margin, float(value) + margin)


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf
