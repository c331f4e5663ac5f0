"""The paper's equations as functions of tensors: features, whitening, rewards, losses."""

from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.rewards import Rewards, feature_matching_rewards

__all__ = ["Rewards", "compute_advantages", "feature_matching_rewards"]
