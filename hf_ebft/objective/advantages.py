"""Advantages from rewards: the factors of grad log p of each rollout in the policy gradient.

Dimension letters: B rows of the batch, n rollouts per block, K blocks. A group is the n rollouts of
one block (b, k); advantages compare rollouts of the same group only.
"""

from torch import Tensor

from hf_ebft.config import ADVANTAGE_ESTIMATORS, AdvantageEstimator
from hf_ebft.objective.rewards import Rewards

# Far above the rounding of rewards of order 1 (1e-7). With a smaller value, a group of duplicates
# would get advantages of order 1 that consist of rounding errors.
GROUP_NORM_EPSILON = 1e-4


def compute_advantages(rewards: Rewards, estimator: AdvantageEstimator = "rloo") -> Tensor:
    """Advantages of rollouts.

    - `rloo`: reward_j - b_j, see `rloo_baseline`. The advantages sum to zero over every group of
      n >= 3 (for n = 2 this holds for the alignment part only). Without whitening, the expected
      policy gradient is that of `reinforce`.
      The variance is smaller than that of `reinforce` if the rewards of a group share an offset:
      with whitening (0.4 times for n = 4 and features with cosines of 0.8), or with one of the two
      coefficients at 0. It is larger without whitening and with equal coefficients: there
      reward_j = 2 x_j . (y - mean of the others) is already centred, and the baseline adds noise
      (1.5 times for n = 4, 1.05 times for n = 16). With n = 2 the baseline removes the offset of
      the alignment part only, and the variance is hundreds of times larger: use `reinforce` or
      more rollouts there.
    - `group_norm`: (reward_j - group mean) / (group standard deviation + `GROUP_NORM_EPSILON`),
      with the unbiased (n - 1) standard deviation. The gradient is biased: the mean contains
      rollout j, and the scale depends on the group.
    - `reinforce`: reward_j itself.

    `fitted` has advantages for each token and needs more than rewards: see
    `hf_ebft.objective.fitted`.

    Args:
        rewards: rewards of rollouts, with fields (B, n, K).
        estimator: one of `ADVANTAGE_ESTIMATORS`.

    Returns:
        (B, n, K).

    Raises:
        ValueError: the estimator is unknown, is `fitted`, or is `rloo` or `group_norm` with a
            single rollout.
    """
    if estimator == "reinforce":
        return rewards.reward
    if estimator == "rloo":
        return rewards.reward - rloo_baseline(rewards)
    if estimator == "group_norm":
        _require_several_rollouts(rewards, "group_norm")
        centred_BnK = rewards.reward - rewards.reward.mean(dim=1, keepdim=True)
        n_rollouts = rewards.reward.shape[1]
        variance_B1K = centred_BnK.square().sum(dim=1, keepdim=True) / (n_rollouts - 1)
        return centred_BnK / (variance_B1K.sqrt() + GROUP_NORM_EPSILON)
    if estimator == "fitted":
        raise ValueError(
            "advantage_estimator='fitted' needs more than rewards: call "
            "hf_ebft.objective.fitted.fitted_advantages instead"
        )
    raise ValueError(
        f"advantage_estimator={estimator!r} is unknown: "
        f"use one of {', '.join(map(repr, ADVANTAGE_ESTIMATORS))}"
    )


def rloo_baseline(rewards: Rewards) -> Tensor:
    """Leave-one-out baseline b_j that does not depend on rollout j (paper eq. 94).

    With alignments a and diversities d of a group of n rollouts,

        b_j = alignment_coef * (sum a - a_j) / (n - 1)
              - diversity_coef * (sum d - 2 d_j) / (n - 2)

    a_j' depends on rollout j' only, so the alignment part is the plain leave-one-out mean.
    Diversities are sums over pairs, d_j' = 2/(n-1) * sum over l != j' of x_j' . x_l, so each of the
    other diversities contains one pair with j. These pairs add up to d_j: sum d - d_j still
    contains them, and sum d - 2 d_j contains exactly the pairs without j. Divided by (n - 2), it is
    the mean diversity that the n - 1 other rollouts would have among themselves. With n = 2 there
    is no pair without j, and the diversity part is 0: the only choice that keeps the baseline
    independent of j.

    A baseline that does not depend on rollout j does not change the expected gradient:
    E[b_j * grad log p_j] = E[b_j] * E[grad log p_j] = 0. Whitening mixes the rollouts of a group,
    so there the independence holds only up to the influence of j on the whitening.

    Args:
        rewards: rewards of rollouts, with fields (B, n, K).

    Returns:
        (B, n, K).

    Raises:
        ValueError: n = 1, where there is no other rollout.
    """
    _require_several_rollouts(rewards, "rloo")
    n_rollouts = rewards.reward.shape[1]
    alignment_sum_B1K = rewards.alignment.sum(dim=1, keepdim=True)
    baseline_BnK = (
        rewards.alignment_coef * (alignment_sum_B1K - rewards.alignment) / (n_rollouts - 1)
    )
    if n_rollouts == 2:
        return baseline_BnK
    diversity_sum_B1K = rewards.diversity.sum(dim=1, keepdim=True)
    diversity_part_BnK = (diversity_sum_B1K - 2 * rewards.diversity) / (n_rollouts - 2)
    return baseline_BnK - rewards.diversity_coef * diversity_part_BnK


def _require_several_rollouts(rewards: Rewards, estimator: str) -> None:
    if rewards.reward.shape[1] < 2:
        raise ValueError(
            f"advantage_estimator={estimator!r} compares the rollouts of a block, but "
            "n_samples_per_prompt is 1: set n_samples_per_prompt to 2 or more (4 is usual), "
            "or use advantage_estimator='reinforce'"
        )
