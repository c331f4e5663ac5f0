"""What a training step computes, for callbacks and for callers of `compute_loss`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_ebft.objective.losses import Objective
from hf_ebft.objective.rewards import Rewards
from hf_ebft.objective.schedules import Coefficients
from hf_ebft.packed.sampling import Rollouts


@dataclass(frozen=True)
class Scores:
    """What `EBFTTrainer.score_rollouts` makes of rollouts.

    Attributes:
        rewards: (B, n, K) rewards and their parts.
        advantages: (B, n, K).
        reference_log_probs: (B, n, K, G) of the rollout tokens under phi, at the sampling
            temperature; None without a KL penalty.
        token_advantages: (B, n, K, G) where every token has its own; `advantages` are their means.
    """

    rewards: Rewards
    advantages: Tensor
    reference_log_probs: Tensor | None
    token_advantages: Tensor | None = None

    @property
    def by_token(self) -> Tensor:
        """What the loss takes: (B, n, K, G), or (B, n, K) where all tokens have the same."""
        return self.advantages if self.token_advantages is None else self.token_advantages


@dataclass(frozen=True)
class EBFTOutput:
    """What `compute_loss(..., return_outputs=True)` returns beside the loss.

    Attributes:
        rollouts: the sampled rollouts.
        rewards: (B, n, K) rewards and their parts.
        advantages: (B, n, K).
        log_probs: (B, n, K, G) of the rollout tokens, at the sampling temperature, with gradient.
        rl_loss, ce_loss, kl: scalars before their weights; None where the weight is zero.
        coefficients: these weights.
    """

    rollouts: Rollouts
    rewards: Rewards
    advantages: Tensor
    log_probs: Tensor
    rl_loss: Tensor
    ce_loss: Tensor | None
    kl: Tensor | None
    coefficients: Coefficients

    @classmethod
    def of(
        cls, rollouts: Rollouts, scores: Scores, log_probs: Tensor, objective: Objective
    ) -> EBFTOutput:
        """From the results of the parts of a step."""
        return cls(
            rollouts,
            scores.rewards,
            scores.advantages,
            log_probs,
            objective.rl,
            objective.ce,
            objective.kl,
            objective.coefficients,
        )
