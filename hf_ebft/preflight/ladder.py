"""Checks whether rewards prefer better continuations, with continuations of known quality.

Every prefix gets five continuations (rungs), each expected to be worse than the one before: the
text itself, a rollout at temperature 0.7, one at temperature 1, a piece of another document, and
random tokens. Each replaces one of the n rollouts of the group, and the other n - 1 stay. So it is
rewarded as in training, including whitening and diversity.

Dimension letters: B rows (1 here), K blocks, n samples, G tokens of a rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ebft.evaluation.bootstrap import Interval, mean_bootstrap
from hf_ebft.packed.sampling import Rollouts, make_generator, sample_rollouts
from hf_ebft.preflight.budget import Deadline
from hf_ebft.preflight.documents import (
    FEWEST_ROWS,
    Batch,
    ground_truth_windows,
    require_blocks,
    window_tokens,
)
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.trainer import EBFTTrainer
from hf_ebft.training.metrics import MetricAccumulator, block_metrics, rollout_metrics
from hf_ebft.training.random_streams import Stream

TEMPERATURES = (0.7, 1.0)
TRUTH, OTHER, RANDOM = "the text itself", "another document", "random tokens"
#: The continuations, from the best to the worst.
RUNGS = (TRUTH, *(f"rollout at {t:g}" for t in TEMPERATURES), OTHER, RANDOM)


@dataclass(frozen=True)
class Order:
    """How often the better one of two continuations is rewarded more.

    Attributes:
        better, worse: names of `RUNGS`.
        accuracy: share of the groups in which the better one is rewarded more, with its interval
            over rows; ties count half.
    """

    better: str
    worse: str
    accuracy: Interval


@dataclass(frozen=True)
class RewardCheck:
    """Rewards of the rungs, and shares of groups and documents without a gradient.

    Attributes:
        rows: number of measured rows that have a block.
        groups: number of prefixes that were continued.
        rewards: name in `RUNGS` -> mean reward, with its interval over rows.
        alignments: name in `RUNGS` -> mean alignment, which ignores the other rollouts of a group.
        orders: the comparisons of all pairs of rungs.
        duplicates: share of rollouts that repeat an earlier one of their group, at the run's
            temperature.
        zero_advantages: share of groups whose advantages are all zero.
        without_blocks: share of documents that have no room for a rollout.
    """

    rows: int
    groups: int
    rewards: dict[str, Interval]
    alignments: dict[str, Interval]
    orders: list[Order]
    duplicates: float
    zero_advantages: float
    without_blocks: float

    def accuracy(self, better: str, worse: str) -> Interval:
        """The accuracy of one pair of rungs."""
        return next(o.accuracy for o in self.orders if (o.better, o.worse) == (better, worse))


def check_rewards(
    trainer: EBFTTrainer, batches: Sequence[Batch], deadline: Deadline
) -> RewardCheck:
    """Reward all rungs on as many rows as there is time for, at least `FEWEST_ROWS`.

    Args:
        trainer: a stand-in.
        batches: batches of one row each.
        deadline: no further row is begun after it.

    Raises:
        ValueError: fewer than two rows have a block.
    """
    windows = [ground_truth_windows(trainer, batch) for batch in batches]
    require_blocks(windows, trainer)
    metrics = MetricAccumulator(trainer.args.device)
    rewards: list[NDArray[np.float64]] = []  # for each row: (rungs, blocks)
    alignments: list[NDArray[np.float64]] = []
    with torch.no_grad(), trainer.random_streams.evaluation():
        for row, batch in enumerate(batches):
            if len(rewards) >= FEWEST_ROWS and deadline.passed:
                break
            rollouts = trainer.sample_rollouts(trainer.model, batch)
            scores = trainer.score_rollouts(rollouts)
            metrics.add(
                block_metrics(scores.rewards, scores.advantages, rollouts.layout)
                | rollout_metrics(rollouts.tokens, rollouts.layout)
            )
            if rollouts.exists.any():
                other = _other_text(windows, row)
                found = [
                    trainer.score_rollouts(_in_group(rollouts, rung)).rewards
                    for rung in _rungs(trainer, rollouts, other, row)
                ]
                exists = rollouts.exists[0]
                for kept, values in (
                    (rewards, [one.reward[0, 0] for one in found]),
                    (alignments, [one.alignment[0, 0] for one in found]),
                ):
                    kept.append(torch.stack(values)[:, exists].double().cpu().numpy())
    return _summary(rewards, alignments, metrics.take(lambda sums: sums))


def pair_accuracy(better: NDArray[np.float64], worse: NDArray[np.float64]) -> float:
    """Share of pairs in which the better one is rewarded more; ties count half."""
    return float(np.mean((better > worse) + 0.5 * (better == worse)))


def _summary(
    rewards: list[NDArray[np.float64]],
    alignments: list[NDArray[np.float64]],
    shares: dict[str, float],
) -> RewardCheck:
    orders = [
        Order(
            RUNGS[first],
            RUNGS[second],
            mean_bootstrap([pair_accuracy(row[first], row[second]) for row in rewards]),
        )
        for first in range(len(RUNGS))
        for second in range(first + 1, len(RUNGS))
    ]
    return RewardCheck(
        rows=len(rewards),
        groups=sum(row.shape[1] for row in rewards),
        rewards=_by_rung(rewards),
        alignments=_by_rung(alignments),
        orders=orders,
        duplicates=shares["ebft/duplicate_rollouts"],
        zero_advantages=shares["ebft/zero_advantage_groups"],
        without_blocks=shares["ebft/documents_without_blocks"],
    )


def _by_rung(values: list[NDArray[np.float64]]) -> dict[str, Interval]:
    """The mean over rows of each rung, with its interval."""
    means = np.array([row.mean(axis=1) for row in values])  # (rows, rungs)
    return {name: mean_bootstrap(means[:, rung]) for rung, name in enumerate(RUNGS)}


def _rungs(trainer: EBFTTrainer, rollouts: Rollouts, other: Tensor, row: int) -> Iterator[Tensor]:
    """(1, K, G) tokens of each rung."""
    layout, device = rollouts.layout, rollouts.tokens.device
    truth = window_tokens(layout)
    yield truth
    single = PackedLayout(layout.documents, layout.blocks, 1, layout.length)
    for number, temperature in enumerate(TEMPERATURES):
        with trainer.accelerator.autocast():
            sampled = sample_rollouts(
                trainer.model,
                trainer._forward,
                single,
                temperature=temperature,
                top_p=1.0,
                chunk_size=trainer.ebft.log_prob_chunk_size,
                generator=_generator(trainer, device, row, number),
            )
        yield sampled.tokens[:, 0]
    index = torch.arange(truth.shape[1], device=device) % len(other)
    yield other.to(device)[index][None]
    yield torch.randint(
        trainer._vocabulary_size,
        truth.shape,
        generator=_generator(trainer, device, row, len(TEMPERATURES)),
        device=device,
    )


def _generator(
    trainer: EBFTTrainer, device: torch.device, row: int, number: int
) -> torch.Generator:
    return make_generator(device, trainer.args.seed, Stream.PREFLIGHT, row, number)


def _in_group(rollouts: Rollouts, candidate: Tensor) -> Rollouts:
    """Replace the first rollout of every group by the candidate (1, K, G)."""
    tokens = rollouts.tokens.clone()
    tokens[:, 0] = candidate
    return replace(rollouts, tokens=tokens)


def _other_text(windows: Sequence[Tensor], row: int) -> Tensor:
    """Windows of the next other row that has some; rows are in random order."""
    order = [(row + step) % len(windows) for step in range(1, len(windows))]
    return next(windows[place] for place in order if len(windows[place]) > 0)
