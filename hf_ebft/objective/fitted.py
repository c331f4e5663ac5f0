"""Advantages for each token, with baselines and control variates fitted to earlier batches.

The reward of rollout j is `2 x_j . d_j`, with x_j its feature and d_j = alignment_coef * y -
diversity_coef * (mean feature of the others), which does not depend on rollout j. Most of its
variance comes from the sampling of later tokens: the last token alone decides about two thirds of
x_j. A plain policy gradient multiplies every token's grad log p by the whole reward. Here the
factor has less variance:

    advantage of token t = 2 (x_j - later_jt - baseline_jt) . d_j

Let s_t be the feature network's state before token t, g(a) the feature of token a without context,
and x ~ A_t s_t + B_t g(a_t) + c_t a ridge regression for every position t. Then

- `later_jt` = sum over u > t of B_u (g(a_u) - E g(a_u)). The expectation is over the policy's
  distribution of token u, given all tokens before it. This is the contribution of the later tokens'
  sampling noise, as the regression predicts it. Each term is a control variate: it has mean zero
  given everything up to token t (C.-A. Cheng, X. Yan and B. Boots, "Trajectory-wise control
  variates for variance reduction in policy gradient methods", 2019, call such sums
  trajectory-wise).
- `baseline_jt` = A_t s_t + B_t E g(a_t) + c_t: the feature that is expected before token t is
  sampled.

Neither changes the expected gradient, however bad the regression, as long as it was fitted to other
rollouts than these. The mean of the other rollouts in d_j is corrected in the same way.

Dimension letters: B rows of the batch, n rollouts per block, K blocks, G tokens of a rollout, D
width of a feature, r width of states and of tokens' features, F = 2 r + 1 regressors, N rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenKnowledge:
    """The inputs of the regressions for every rollout token, (B, n, K, G, r) each.

    Attributes:
        states: states of the feature network before the token.
        tokens: features of the token without context.
        expected: expectation of `tokens` under the policy, given all tokens before.
    """

    states: Tensor
    tokens: Tensor
    expected: Tensor

    def regressors(self, tokens: Tensor) -> Tensor:
        """(B, n, K, G, F): states, tokens and a constant."""
        return torch.cat([self.states, tokens, torch.ones_like(tokens[..., :1])], dim=-1)


def fitted_advantages(
    generated: Tensor,
    ground_truth: Tensor,
    knowledge: TokenKnowledge,
    coefficients: Tensor | None,
    *,
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
) -> Tensor:
    """Advantages for each token, for unit features without whitening.

    Args:
        generated: (B, n, K, D) features of the rollouts, n >= 2.
        ground_truth: (B, K, D).
        knowledge: the regressions' inputs for the same rollouts.
        coefficients: (G, F, D) coefficients of regressions that were fitted to other rollouts. None
            means all zero, which gives the reward itself.
        alignment_coef, diversity_coef: coefficients of the reward.

    Returns:
        (B, n, K, G).

    Raises:
        ValueError: there is a single rollout per block.
    """
    n = generated.shape[1]
    if n < 2:
        raise ValueError(
            "advantage_estimator='fitted' compares rollouts with the others of their block, but "
            "n_samples_per_prompt is 1: set it to 2 or more, or use 'reinforce'"
        )
    corrected = generated
    if coefficients is not None:
        r = knowledge.tokens.shape[-1]
        surprise = knowledge.tokens - knowledge.expected
        token_coefficients = coefficients[:, r : 2 * r]
        corrected = generated - torch.einsum("bnkgr,grd->bnkd", surprise, token_coefficients)
    others = (corrected.sum(dim=1, keepdim=True) - corrected) / (n - 1)
    direction = alignment_coef * ground_truth[:, None] - diversity_coef * others
    reward = (generated * direction).sum(dim=-1)[..., None]
    if coefficients is None:
        return 2 * reward.expand(*reward.shape[:-1], knowledge.tokens.shape[-2])
    # Only the component along each rollout's direction matters: F numbers per token, not F x D.
    along_direction = torch.einsum("bnkd,gfd->bnkgf", direction, coefficients)
    noise = (surprise * along_direction[..., r : 2 * r]).sum(dim=-1)
    later = noise.sum(dim=-1, keepdim=True) - noise.cumsum(dim=-1)
    baseline = (knowledge.regressors(knowledge.expected) * along_direction).sum(dim=-1)
    return 2 * (reward - later - baseline)


class Moments:
    """Sums of products of regressors with each other and with features, for each token position.

    Attributes:
        gram: (G, F, F), regressors with regressors.
        cross: (G, F, D), regressors with features.
        count: number of rollouts.
    """

    def __init__(self, gram: Tensor, cross: Tensor, count: Tensor) -> None:
        self.gram, self.cross, self.count = gram, cross, count

    @classmethod
    def zeros(cls, length: int, n_regressors: int, width: int, device: torch.device) -> Moments:
        """Moments of no rollouts."""
        return cls(
            torch.zeros(length, n_regressors, n_regressors, device=device),
            torch.zeros(length, n_regressors, width, device=device),
            torch.zeros((), device=device),
        )

    def add(self, regressors: Tensor, features: Tensor) -> None:
        """Add rollouts: their regressors (N, G, F) and their features (N, D)."""
        by_token = regressors.transpose(0, 1)
        self.gram += by_token.transpose(1, 2) @ by_token
        self.cross += by_token.transpose(1, 2) @ features
        self.count += len(features)

    def plus(self, other: Moments, *, decay: float) -> Moments:
        """The sum of `decay` times these moments and others."""
        pairs = zip(self.parts, other.parts, strict=True)
        return Moments(*(decay * own + new for own, new in pairs))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that must be summed over processes."""
        return self.gram, self.cross, self.count

    def solve(self, strength: Tensor) -> Tensor:
        """Ridge coefficients (G, F, D), float32.

        Args:
            strength: (G,) strength of the penalty, in rollouts: with that many rollouts, data and
                penalty have about the same weight. The constant is not penalised.
        """
        gram = self.gram.double()
        scale = gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(dim=1) / self.count.clamp(min=1)
        penalty = (strength.double() * scale + 1e-9)[:, None].repeat(1, gram.shape[1])
        penalty[:, -1] = 1e-9
        factor = torch.linalg.cholesky(gram + torch.diag_embed(penalty))
        return torch.cholesky_solve(self.cross.double(), factor).to(self.cross.dtype)

    def error(self, coefficients: Tensor) -> Tensor:
        """(G,) squared error of predictions by these coefficients, up to a constant."""
        quadratic = (coefficients * (self.gram @ coefficients)).sum(dim=(1, 2))
        return quadratic - 2 * (coefficients * self.cross).sum(dim=(1, 2))
