"""Signal and noise of the two gradients: how many documents a step needs."""

from __future__ import annotations

from dataclasses import dataclass

from hf_ebft.objective.noise_scale import Estimate, NoiseScale, gradient_cosine, noise_scale
from hf_ebft.preflight.gradients import Products


@dataclass(frozen=True)
class Signal:
    """Noise scales of both gradients, and the cosine between them.

    Attributes:
        rows: number of measured rows.
        ebft, cross_entropy: noise scales, see `hf_ebft.objective.noise_scale`.
        cosine: cosine between the two expected gradients, not biased by noise; NaN if one of them
            cannot be distinguished from zero.
        n_weights: number of entries of a gradient.
        kept: number of values kept of each gradient; equal to `n_weights` if products are exact.
    """

    rows: int
    ebft: NoiseScale
    cross_entropy: NoiseScale
    cosine: Estimate
    n_weights: int
    kept: int


def signal_of(products: Products) -> Signal:
    """Estimates and intervals from the products of gradients."""
    return Signal(
        rows=len(products.ebft),
        ebft=noise_scale(products.ebft),
        cross_entropy=noise_scale(products.cross_entropy),
        cosine=gradient_cosine(
            products.ebft, products.cross_entropy, products.cross, same_documents=True
        ),
        n_weights=products.n_weights,
        kept=products.size,
    )
