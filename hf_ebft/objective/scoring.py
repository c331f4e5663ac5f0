"""How well the features of rollouts match those of the truth: three estimates from one group.

Let x and x' be the features of two independent rollouts of the policy after a prefix, y the feature
of the truth, and V = E||x - E x||^2 the policy's own spread. Then

    E||x - y||^2 = ||E x - y||^2 + V = CFM loss + V,       E||x - x'||^2 = 2 V, hence
    CFM loss     = E||x - y||^2 - 1/2 E||x - x'||^2,

which is the energy score with exponent 2 of Gneiting & Raftery (2007, "Strictly Proper Scoring
Rules, Prediction, and Estimation", section 4.3). It is proper, but not strictly: it depends on E x
only, so every policy with the right mean feature scores as well as the truth. In expectation over
the truths of a prefix,

    E_y CFM loss = ||E x - E y||^2 + E||y - E y||^2.

A policy may therefore lower it by becoming sharper, if that moves its mean feature towards the
truth's. Two more scores depend on the spread:

- `excess_over_spread`: CFM loss - V. In expectation over the truths it is
  ||E x - E y||^2 + E||y - E y||^2 - V. It is zero if the policy's features have the distribution of
  the truth's, and above zero for an overconfident policy. A policy that spreads too widely makes it
  negative, so it must not be minimised.
- `energy_score`: E||x - y|| - 1/2 E||x - x'||, exponent 1. It is strictly proper: in expectation
  over the truths, only the distribution of the truth's own features reaches the minimum.

Each is estimated without bias from n >= 2 rollouts, by means over the n rollouts and over the
n (n - 1) pairs of different rollouts. All are computed by elementwise products and sums. Matrix
products are avoided, since an enclosing autocast region or TF32 would compute them with few bits.

Dimension letters: n rollouts of a group, D feature width; `...` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cfm_loss(x: Tensor, y: Tensor) -> Tensor:
    """||E x - y||^2 (paper, eq. 2): the mean over pairs j != j' of (x_j - y) . (x_j' - y).

    The estimate is unbiased and can therefore be negative. Since it is computed from the
    differences to y, it is exactly 0 if every rollout has the feature of the truth.

    Args:
        x: (..., n, D) float32 or float64 features of the rollouts.
        y: (..., D) features of the truth.

    Returns:
        (...). For n = 1, which has no pairs, ||x - y||^2: too large by the spread of x.
    """
    n_rollouts = x.shape[-2]
    difference = x - y.unsqueeze(-2)
    squares = torch.linalg.vector_norm(difference, dim=(-2, -1)).square()
    if n_rollouts == 1:
        return squares
    square_of_sum = torch.linalg.vector_norm(difference.sum(dim=-2), dim=-1).square()
    return (square_of_sum - squares) / (n_rollouts * (n_rollouts - 1))


def excess_over_spread(x: Tensor, y: Tensor) -> Tensor:
    """||E x - y||^2 - E||x - E x||^2: the CFM loss minus the spread of the rollouts.

    The second term is estimated by the sample variance, sum_j ||x_j - mean x||^2 / (n - 1). For
    unit features, the result is minus the mean reward without whitening and with both coefficients
    1.

    Args:
        x: (..., n, D) float32 or float64 features of the rollouts.
        y: (..., D) features of the truth.

    Returns:
        (...), unbiased for n >= 2. For n = 1, where the spread is unknown, ||x - y||^2.
    """
    n_rollouts = x.shape[-2]
    if n_rollouts == 1:
        return cfm_loss(x, y)
    difference = x - y.unsqueeze(-2)
    centred = difference - difference.mean(dim=-2, keepdim=True)
    spread = torch.linalg.vector_norm(centred, dim=(-2, -1)).square() / (n_rollouts - 1)
    return cfm_loss(x, y) - spread


def energy_score(x: Tensor, y: Tensor) -> Tensor:
    """E||x - y|| - 1/2 E||x - x'||: lower if the policy's distribution is nearer to the truth's.

    It is strictly proper (Gneiting & Raftery 2007, section 4.3, exponent 1, with the sign
    reversed). The second mean is over pairs of different rollouts. By the triangle inequality it is
    never negative.

    Args:
        x: (..., n, D) float32 or float64 features of the rollouts.
        y: (..., D) features of the truth.

    Returns:
        (...), unbiased for n >= 2. For n = 1, which has no pairs, ||x - y||: too large by half the
        mean distance of two rollouts.
    """
    n_rollouts = x.shape[-2]
    to_truth = torch.linalg.vector_norm(x - y.unsqueeze(-2), dim=-1).mean(dim=-1)
    if n_rollouts == 1:
        return to_truth
    # Both orders of each pair, and a diagonal of zeros.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    among_themselves = distances.sum(dim=(-2, -1)) / (n_rollouts * (n_rollouts - 1))
    return to_truth - among_themselves / 2
