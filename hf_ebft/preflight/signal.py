"""Signal and noise of the two gradients: how many documents a step must have to find its way."""

from __future__ import annotations

from dataclasses import dataclass

from hf_ebft.objective.noise_scale import Estimate, NoiseScale, gradient_cosine, noise_scale
from hf_ebft.preflight.gradients import Products


@dataclass(frozen=True)
class Signal:
    """Noise scales, and whether the two gradients agree.

    Attributes:
        rows: that were measured.
        ebft, cross_entropy: see `hf_ebft.objective.noise_scale`.
        cosine: between the two expected gradients, noise taken out; NaN where one of them cannot
            be told from zero.
        n_weights: entries of a gradient.
        kept: numbers kept of each gradient; equally many where products are exact.
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
