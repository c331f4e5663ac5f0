"""The metrics of a run: collected per micro-batch, summed over processes when they are logged.

Every metric is a ratio of two sums. So means over micro-batches, accumulation steps and processes
with different numbers of blocks are correct, and one small all-reduce is enough for all metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import reduce
from torch import Tensor

from hf_ebft.objective.rewards import Rewards
from hf_ebft.rows.anchors import count_replies
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.metric_table import PREFIX

# Advantages up to this count as zero. Rewards have a range of about 2.
ZERO_ADVANTAGE = 1e-6

# Sums are reduced in this order, also those of metrics that a process has not seen, so that all
# processes send equally many numbers.
NAMES = (
    "alignment",
    "diversity",
    "mean_reward",
    "cfm_loss",
    "energy_score",
    "excess_over_spread",
    "rl_loss",
    "ce_loss",
    "kl",
    "rl_coef",
    "ce_coef",
    "kl_coef",
    "advantages_mean",
    "advantages_square",
    "entropy",
    "duplicate_rollouts",
    "zero_advantage_groups",
    "blocks_per_document",
    "documents_without_blocks",
    "replies_without_blocks",
    "seconds_rollout",
    "seconds_features",
    "seconds_training",
    "row_shapes",
)


@dataclass(frozen=True)
class Ratio:
    """A metric's contribution: the sum of its values and their number (or weight)."""

    total: Tensor | float
    count: Tensor | float


class MetricAccumulator:
    """Sums of metrics since they were last taken.

    Args:
        device: device of the sums; adding to them does not synchronize with it.
    """

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64; float32 sums over one logging interval are exact enough there.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2, len(NAMES), dtype=dtype, device=device)

    def add(self, values: Mapping[str, Ratio]) -> None:
        """Add contributions; names must be in `NAMES`."""
        for name, ratio in values.items():
            column = NAMES.index(name)
            self._sums[0, column] += ratio.total
            self._sums[1, column] += ratio.count

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over everything added since the last call, on all processes; clears the sums.

        Args:
            reduce: sums a tensor over processes. Called exactly once, on every process.

        Returns:
            `ebft/...` names to numbers; metrics without contributions are left out.
        """
        totals, counts = reduce(self._sums).tolist()
        self.clear()
        means = {
            name: total / count
            for name, total, count in zip(NAMES, totals, counts, strict=True)
            if count
        }
        if "advantages_square" in means:
            variance = means.pop("advantages_square") - means.pop("advantages_mean") ** 2
            means["advantages_std"] = max(variance, 0.0) ** 0.5
        return {PREFIX + name: value for name, value in means.items()}

    def clear(self) -> None:
        """Forget everything added since the last `take`."""
        self._sums.zero_()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on every one: a collective call."""
    return reduce(values, reduction="sum")


def block_metrics(rewards: Rewards, advantages: Tensor, layout: PackedLayout) -> dict[str, Ratio]:
    """Metrics of rewards and advantages over the blocks that exist.

    Args:
        rewards: rewards of the batch, fields (B, n, K) and (B, K).
        advantages: (B, n, K).
        layout: the batch.
    """
    exists, weights = layout.blocks.exists, layout.blocks.weights
    blocks = weights.sum()
    rollouts = blocks * layout.n_samples

    def over_rollouts(values: Tensor) -> Ratio:
        return over_blocks(values.sum(dim=1), rollouts)

    def over_blocks(values: Tensor, count: Tensor = blocks) -> Ratio:
        return Ratio((torch.where(exists, values, 0.0) * weights).sum(), count)

    all_zero = (advantages.abs() <= ZERO_ADVANTAGE).all(dim=1)
    return {
        "alignment": over_rollouts(rewards.alignment),
        "diversity": over_rollouts(rewards.diversity),
        "mean_reward": over_rollouts(rewards.reward),
        "cfm_loss": over_blocks(rewards.cfm_loss),
        "energy_score": over_blocks(rewards.energy_score),
        "excess_over_spread": over_blocks(rewards.excess_over_spread),
        "advantages_mean": over_rollouts(advantages),
        "advantages_square": over_rollouts(advantages.square()),
        "zero_advantage_groups": over_blocks(all_zero.float()),
    }


def rollout_metrics(tokens: Tensor, layout: PackedLayout) -> dict[str, Ratio]:
    """Metrics of duplicate rollouts, and of the number of blocks per document.

    Args:
        tokens: (B, n, K, G).
        layout: the batch.
    """
    weights = layout.blocks.weights
    same = (tokens[:, :, None] == tokens[:, None, :]).all(dim=-1)  # (B, n, n, K)
    earlier = torch.ones(same.shape[1:3], dtype=torch.bool, device=same.device).tril(-1)
    repeats = (same & earlier[None, :, :, None]).any(dim=2)  # (B, n, K)
    documents = layout.documents.count
    replies = count_replies(layout.documents, layout.blocks.before_choice, layout.length)
    return {
        "duplicate_rollouts": Ratio(
            (repeats * weights[:, None, :]).sum(), weights.sum() * layout.n_samples
        ),
        "blocks_per_document": Ratio(layout.blocks.exists.sum(), documents),
        "documents_without_blocks": Ratio(documents - documents_with_blocks(layout), documents),
        "replies_without_blocks": Ratio(replies.without_blocks, replies.count),
    }


def documents_with_blocks(layout: PackedLayout) -> Tensor:
    """Number of documents that have at least one block, a float scalar."""
    blocks = layout.blocks.before_choice
    return (blocks.exists / blocks.per_document().clamp(min=1)).sum().round()


def token_metrics(
    rollout_log_probs: Tensor,
    rl_loss: Tensor,
    ce_loss: Tensor | None,
    kl: Tensor | None,
    layout: PackedLayout,
) -> dict[str, Ratio]:
    """Metrics of the training pass.

    The entropy is estimated by the mean of `-log p` of the sampled tokens at the sampling
    temperature. This costs nothing, and is unbiased when `top_p` is 1.

    Args:
        rollout_log_probs: (B, n, K, G).
        rl_loss, ce_loss, kl: scalars; metrics of those that are None are left out.
        layout: the batch.
    """
    exists, weights = layout.blocks.exists, layout.blocks.weights
    tokens = weights.sum() * layout.n_samples * layout.length
    documents: Documents = layout.documents
    by_block = -rollout_log_probs.detach().sum(dim=(1, 3))
    surprise = (torch.where(exists, by_block, 0.0) * weights).sum()
    metrics = {
        "entropy": Ratio(surprise, tokens),
        "rl_loss": Ratio(rl_loss.detach() * documents.count, documents.count),
    }
    if ce_loss is not None:
        metrics["ce_loss"] = Ratio(ce_loss.detach() * documents.count, documents.count)
    if kl is not None:
        metrics["kl"] = Ratio(kl.detach() * documents.count, documents.count)
    return metrics
