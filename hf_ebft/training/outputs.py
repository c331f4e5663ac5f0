"""Results of a training step, for callbacks and for callers of `compute_loss`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_ebft.objective.losses import Objective
from hf_ebft.objective.rewards import Rewards
from hf_ebft.objective.schedules import Coefficients
from hf_ebft.packed.sampling import Rollouts


@dataclass(frozen=True)
class Scores:
    """Rewards and advantages of rollouts, as `EBFTTrainer.score_rollouts` returns them.

    Attributes:
        rewards: (B, n, K) rewards and their parts.
        advantages: (B, n, K).
        reference_log_probs: (B, n, K, G) log-probabilities of the rollout tokens under phi, at the
            sampling temperature; None without a KL penalty.
        token_advantages: (B, n, K, G) if every token has its own advantage, of which `advantages`
            are the means; else None.
    """

    rewards: Rewards
    advantages: Tensor
    reference_log_probs: Tensor | None
    token_advantages: Tensor | None = None

    @property
    def by_token(self) -> Tensor:
        """The advantages for the loss: (B, n, K, G), or (B, n, K) if all tokens have the same."""
        return self.advantages if self.token_advantages is None else self.token_advantages


@dataclass(frozen=True)
class EBFTOutput:
    """The outputs that `compute_loss(..., return_outputs=True)` returns in addition to the loss.

    Attributes:
        rollouts: the sampled rollouts.
        rewards: (B, n, K) rewards and their parts.
        advantages: (B, n, K).
        log_probs: (B, n, K, G) log-probabilities of the rollout tokens, at the sampling
            temperature, with gradient.
        rl_loss, ce_loss, kl: scalars, not yet weighted; None if the weight is zero.
        coefficients: the weights.
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
    def from_step(
        cls, rollouts: Rollouts, scores: Scores, log_probs: Tensor, objective: Objective
    ) -> EBFTOutput:
        """Collect the results of the parts of a step."""
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
