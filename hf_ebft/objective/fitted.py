"""Advantages per token with baselines and control variates that were fitted to earlier batches.

The reward of rollout j is `2 x_j . d_j`, with x_j its feature and d_j = alignment_coef * y -
diversity_coef * (mean feature of the others), which does not depend on j. Most of its variance is
luck that later tokens bring: the last token alone decides about two thirds of x_j. A policy
gradient charges every token with all of it. Here each token is charged with less:

    advantage of token t = 2 (x_j - later_jt - baseline_jt) . d_j

With s_t the feature network's state before token t, g(a) what it makes of token a on its own, and a
ridge regression x ~ A_t s_t + B_t g(a_t) + c_t for every place t:

- `later_jt` = sum over u > t of B_u (g(a_u) - E g(a_u)), the expectation being the policy's, given
  what comes before token u: what the later tokens added by luck, as far as the regression knows.
  Each term has mean zero given all that token t may depend on (a control variate; C.-A. Cheng, X.
  Yan and B. Boots, "Trajectory-wise control variates for variance reduction in policy gradient
  methods", 2019, call sums of them trajectory-wise).
- `baseline_jt` = A_t s_t + B_t E g(a_t) + c_t: what was to be expected before token t was drawn.

Neither changes the expected gradient, whatever the regression says, as long as it was fitted to
other rollouts than these. The mean of the other rollouts in d_j is freed of its luck the same way.

Dimension letters: B rows of the batch, n rollouts per block, K blocks, G tokens of a rollout, D
width of a feature, r width of states and of tokens' features, F = 2 r + 1 regressors, N rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenKnowledge:
    """What is known of every rollout token, in r dimensions, (B, n, K, G, r) each.

    Attributes:
        states: of the feature network before the token.
        tokens: of the token on its own.
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
    """Advantages of every token, for unit features without whitening.

    Args:
        generated: (B, n, K, D) features of the rollouts, n >= 2.
        ground_truth: (B, K, D).
        knowledge: of the same rollouts.
        coefficients: (G, F, D) of regressions fitted to other rollouts; None: all zero, which gives
            the reward itself.
        alignment_coef, diversity_coef: of the reward.

    Returns:
        (B, n, K, G).

    Raises:
        ValueError: a single rollout per block, where there are no others.
    """
    n = generated.shape[1]
    if n < 2:
        raise ValueError(
            "advantage_estimator='fitted' compares rollouts with the others of their block, but "
            "n_samples_per_prompt is 1: set it to 2 or more, or use 'reinforce'"
        )
    freed = generated
    if coefficients is not None:
        r = knowledge.tokens.shape[-1]
        surprise = knowledge.tokens - knowledge.expected
        of_tokens = coefficients[:, r : 2 * r]
        freed = generated - torch.einsum("bnkgr,grd->bnkd", surprise, of_tokens)
    others = (freed.sum(dim=1, keepdim=True) - freed) / (n - 1)
    direction = alignment_coef * ground_truth[:, None] - diversity_coef * others
    reward = (generated * direction).sum(dim=-1)[..., None]
    if coefficients is None:
        return 2 * reward.expand(*reward.shape[:-1], knowledge.tokens.shape[-2])
    # Everything below is along one direction a rollout: F numbers a token instead of F x D.
    along = torch.einsum("bnkd,gfd->bnkgf", direction, coefficients)
    luck = (surprise * along[..., r : 2 * r]).sum(dim=-1)
    later = luck.sum(dim=-1, keepdim=True) - luck.cumsum(dim=-1)
    baseline = (knowledge.regressors(knowledge.expected) * along).sum(dim=-1)
    return 2 * (reward - later - baseline)


class Moments:
    """Second moments of regressors with themselves and with features, by token.

    Attributes:
        gram: (G, F, F).
        cross: (G, F, D).
        count: rollouts.
    """

    def __init__(self, gram: Tensor, cross: Tensor, count: Tensor) -> None:
        self.gram, self.cross, self.count = gram, cross, count

    @classmethod
    def zeros(cls, length: int, n_regressors: int, width: int, device: torch.device) -> Moments:
        """Of nothing yet."""
        return cls(
            torch.zeros(length, n_regressors, n_regressors, device=device),
            torch.zeros(length, n_regressors, width, device=device),
            torch.zeros((), device=device),
        )

    def add(self, regressors: Tensor, features: Tensor) -> None:
        """Count rollouts: (N, G, F) and their features (N, D)."""
        by_token = regressors.transpose(0, 1)
        self.gram += by_token.transpose(1, 2) @ by_token
        self.cross += by_token.transpose(1, 2) @ features
        self.count += len(features)

    def plus(self, other: Moments, *, decay: float) -> Moments:
        """These, weighed by `decay`, and others."""
        pairs = zip(self.parts, other.parts, strict=True)
        return Moments(*(decay * own + new for own, new in pairs))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What must be summed over processes."""
        return self.gram, self.cross, self.count

    def solve(self, strength: Tensor) -> Tensor:
        """Ridge coefficients (G, F, D), float32.

        Args:
            strength: (G,) of the penalty, in rollouts: with as many rollouts, data and penalty
                weigh about the same. The constant is not penalised.
        """
        gram = self.gram.double()
        scale = gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(dim=1) / self.count.clamp(min=1)
        penalty = (strength.double() * scale + 1e-9)[:, None].repeat(1, gram.shape[1])
        penalty[:, -1] = 1e-9
        factor = torch.linalg.cholesky(gram + torch.diag_embed(penalty))
        return torch.cholesky_solve(self.cross.double(), factor).to(self.cross.dtype)

    def error(self, coefficients: Tensor) -> Tensor:
        """(G,) squared error of predictions for these rollouts, up to a constant."""
        quadratic = (coefficients * (self.gram @ coefficients)).sum(dim=(1, 2))
        return quadratic - 2 * (coefficients * self.cross).sum(dim=(1, 2))
