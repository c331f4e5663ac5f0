"""Rewards of completions without an answer: never above those of answers in their group.

Dimension letters: P prompts, n completions of a prompt.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_ebft.objective.rewards import Rewards


def rank_unfinished_last(rewards: Rewards, has_answer: Tensor) -> Rewards:
    """Give completions that end within their thinking the worst alignment and diversity.

    Such a completion u has no features. It counts as the opposite of the ground truth and as a copy
    of every other completion of its group (their dot product is taken as 1):

        alignment_u = -2
        diversity_u = 2 / (n - 1) * sum over j != u of 1 = 2
        diversity_j = 2 / (n - 1) * (sum over answers j' != j of x_j . x_j' + number of such u)

    No cosine is below -1, and no dot product of features is above 1 (features are normalised, and
    whitened rollouts of a group are shorter). So u is last in both. It is then last in every reward
    and every advantage that rises with alignment and falls with diversity, as with all estimators.
    Diversity is still a sum over pairs, so the leave-one-out baseline (paper, eq. 94) is still
    independent of j, and advantages still sum to zero.

    Args:
        rewards: fields (P, n, 1), from features of zero for completions without an answer.
        has_answer: (P, n, 1) bool.

    Returns:
        The rewards with alignment, diversity and reward as above. The CFM loss keeps features of
        zero for completions without an answer.
    """
    n_samples = has_answer.shape[1]
    missing = ~has_answer
    others_missing = missing.sum(dim=1, keepdim=True) - missing.long()
    pairs = others_missing * (2 / max(n_samples - 1, 1))
    alignment = torch.where(has_answer, rewards.alignment, -2.0)
    diversity = torch.where(has_answer, rewards.diversity + pairs, 2.0)
    return replace(
        rewards,
        reward=rewards.alignment_coef * alignment - rewards.diversity_coef * diversity,
        alignment=alignment,
        diversity=diversity,
    )
