"""Noise scales against closed forms (Gaussian gradients) and brute force over pairs."""

import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from hf_ebft.objective.noise_scale import (
    gradient_cosine,
    gradient_products,
    noise_ratio,
    noise_scale,
)


def gaussian(count: int, *, seed: int, signal: float = 1.0, width: int = 50) -> Tensor:
    """(count, width) gradients: mean of squared norm `signal`^2, covariance of trace `width`."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.full((width,), signal / math.sqrt(width))
    return mean + torch.randn(count, width, generator=generator)


def test_products_are_those_of_all_pairs_whatever_the_chunk() -> None:
    gradients = gaussian(5, seed=0)
    expected = [[float(a.double() @ b.double()) for b in gradients] for a in gradients]
    for chunk in (7, 50, 1000):
        products = gradient_products(gradients, chunk=chunk)
        torch.testing.assert_close(products, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(gradient_products(iter(gradients)), products)


def test_estimates_equal_plain_sums_over_pairs() -> None:
    gradients = gaussian(6, seed=1).double()
    found = noise_scale(gradient_products(gradients))
    pairs = list(itertools.permutations(gradients, 2))
    signal = sum(float(a @ b) for a, b in pairs) / len(pairs)
    # The unbiased variance of every entry, added up.
    noise = float(gradients.var(dim=0, unbiased=True).sum())
    assert found.signal == pytest.approx(signal)
    assert found.noise == pytest.approx(noise)
    assert found.documents == pytest.approx(noise / signal)


def test_estimates_are_unbiased_for_known_mean_and_covariance() -> None:
    """1000 samples of 8 gradients: means within four standard errors of the closed form."""
    found = [noise_scale(gradient_products(gaussian(8, seed=s, signal=2.0))) for s in range(1000)]
    for values, expected in (
        (torch.tensor([f.signal for f in found]), 4.0),
        (torch.tensor([f.noise for f in found]), 50.0),
    ):
        error = float(values.std()) / math.sqrt(len(values))
        assert error < 0.15
        assert abs(float(values.mean()) - expected) < 4 * error


def test_gradients_of_batches_give_the_noise_of_a_document() -> None:
    """Means of 5 documents: a fifth of the noise each, the same noise scale in documents."""
    documents = gaussian(4000, seed=2, signal=5.0)
    single = noise_scale(gradient_products(documents))
    batched = noise_scale(
        gradient_products(documents.view(800, 5, -1).mean(dim=1)), documents_per_gradient=5
    )
    assert single.noise == pytest.approx(50.0, rel=0.02)
    assert batched.noise == pytest.approx(50.0, rel=0.05)
    assert single.documents == pytest.approx(2.0, rel=0.05)
    assert batched.documents == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("signal", [0.5, 3.0])
def test_the_interval_has_its_nominal_coverage(signal: float) -> None:
    truth = 50 / signal**2
    found = [
        noise_scale(gradient_products(gaussian(24, seed=s, signal=signal)), confidence=0.9)
        for s in range(400)
    ]
    share = sum(f.low <= truth <= f.high for f in found) / len(found)
    # 0.86 lies 2.7 standard errors below 0.9; without signal the jackknife is too wide.
    assert 0.86 < share < (0.94 if signal == 3.0 else 1.0)


def test_no_signal_leaves_the_noise_scale_unbounded() -> None:
    found = noise_scale(gradient_products(gaussian(10, seed=3, signal=0.0)))
    assert found.high == math.inf
    opposed = noise_scale(gradient_products(torch.tensor([[1.0], [-1.0], [0.1]])))
    assert opposed.signal < 0
    assert opposed.documents == math.inf


def test_jackknife_leaves_out_one_gradient_at_a_time() -> None:
    """Bounds of the ratio of noises against a loop that estimates everything afresh."""
    some, other = gaussian(7, seed=4), 1.5 * gaussian(7, seed=5)
    found = noise_ratio(gradient_products(some), gradient_products(other), confidence=0.95)

    def ratio(kept: list[int]) -> float:
        return float(some[kept].var(dim=0).sum() / other[kept].var(dim=0).sum())

    everything = list(range(7))
    left_out = torch.tensor([ratio([j for j in everything if j != i]) for i in everything])
    margin = 1.959964 * math.sqrt(6 / 7 * float((left_out - left_out.mean()).square().sum()))
    assert found.value == pytest.approx(ratio(everything), rel=1e-5)
    assert found.low == pytest.approx(ratio(everything) - margin, rel=1e-4)
    assert found.high == pytest.approx(ratio(everything) + margin, rel=1e-4)


def test_cosine_of_independent_samples_is_not_biased_by_noise() -> None:
    """Means at a known angle under noise ten times their size."""
    width, angle = 40, 0.6
    first, second = torch.zeros(width), torch.zeros(width)
    first[0], second[0], second[1] = 1.0, math.cos(angle), math.sin(angle)
    generator = torch.Generator().manual_seed(6)
    a = first + 0.5 * torch.randn(600, width, generator=generator)
    b = second + 0.5 * torch.randn(500, width, generator=generator)
    cross = a.double() @ b.double().T
    found = gradient_cosine(gradient_products(a), gradient_products(b), cross, same_documents=False)
    assert found.low < math.cos(angle) < found.high
    assert found.high - found.low < 0.15
    plain = torch.nn.functional.cosine_similarity(a[:20].mean(0), b[:20].mean(0), dim=0)
    assert float(plain) < 0.7  # what noise would make of it


def test_cosine_on_the_same_documents_ignores_shared_noise() -> None:
    """Two kinds with one mean whose noise is opposed on each document: cosine 1, not less."""
    noise = 3 * torch.randn(300, 20, generator=torch.Generator().manual_seed(7))
    mean = torch.ones(20)
    a, b = mean + noise, mean - noise
    products = gradient_products(torch.cat([a, b]))
    found = gradient_cosine(
        products[:300, :300], products[300:, 300:], products[:300, 300:], same_documents=True
    )
    assert found.low < 1 < found.high
    assert found.high - found.low < 0.3
    assert float(products[:300, 300:].mean()) < 20 - 0.5  # with the diagonal it would be biased


def test_cosine_without_signal_is_nan() -> None:
    none = gradient_products(torch.tensor([[1.0], [-1.0], [0.1]]))
    assert math.isnan(gradient_cosine(none, none, none, same_documents=True).value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: noise_scale(p[:2, :2]), "dot products of N >= 3 gradients"),
        (lambda p: noise_scale(p[:3]), "(3, 4)"),
        (lambda p: noise_scale(p, documents_per_gradient=0), "documents_per_gradient=0"),
        (lambda p: noise_scale(p, confidence=95), "confidence=95"),
        (lambda p: noise_ratio(p, p[:3, :3]), "same documents"),
        (lambda p: gradient_cosine(p, p, p[:3], same_documents=True), "shape (4, 4)"),
        (
            lambda p: gradient_cosine(p, p[:3, :3], p[:, :3], same_documents=True),
            "equally many gradients",
        ),
    ],
)
def test_matrices_and_settings_that_do_not_fit_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    products = gradient_products(gaussian(4, seed=9))
    with pytest.raises(ValueError, match=re.escape(message)):
        call(products)
