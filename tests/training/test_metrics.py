"""Metrics against loops: ratios of sums, so that unequal shares are averaged correctly."""

import pytest
import torch
from torch import Tensor

from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.rewards import feature_matching_rewards
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.metrics import (
    NAMES,
    MetricAccumulator,
    Ratio,
    block_metrics,
    documents_with_blocks,
    rollout_metrics,
    token_metrics,
)

CPU = torch.device("cpu")


def as_they_are(sums: Tensor) -> Tensor:
    """The reduction for a single process."""
    return sums


def layout_of(*lengths: int, n_samples: int = 3, length: int = 2) -> PackedLayout:
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, width in enumerate(lengths):
        mask[row, :width] = 1
    ids = torch.randint(5, mask.shape)
    documents = Documents.from_inputs({"input_ids": ids, "attention_mask": mask})
    blocks = find_blocks(documents, stride=2, context_length=2, generate_max_len=length)
    return PackedLayout(documents, blocks, n_samples, length)


def test_means_weigh_every_contribution_by_its_count() -> None:
    metrics = MetricAccumulator(CPU)
    metrics.add({"alignment": Ratio(torch.tensor(6.0), 3)})
    metrics.add({"alignment": Ratio(4.0, torch.tensor(1)), "kl": Ratio(0.5, 1)})
    assert metrics.take(as_they_are) == {"ebft/alignment": 2.5, "ebft/kl": 0.5}
    assert metrics.take(as_they_are) == {}


def test_means_are_taken_over_all_processes() -> None:
    """The other process has more blocks, and one metric that this one has not seen."""
    mine, other = MetricAccumulator(CPU), MetricAccumulator(CPU)
    mine.add({"alignment": Ratio(2.0, 1)})
    other.add({"alignment": Ratio(1.0, 5), "ce_loss": Ratio(8.0, 4)})
    theirs: list[Tensor] = []
    other.take(lambda sums: theirs.append(sums.clone()) or sums)  # type: ignore[func-returns-value]
    calls: list[int] = []

    def reduce(sums: Tensor) -> Tensor:
        calls.append(1)
        return sums + theirs[0]

    assert mine.take(reduce) == {"ebft/alignment": 0.5, "ebft/ce_loss": 2.0}
    assert len(calls) == 1


def test_every_process_reduces_whatever_it_has_seen() -> None:
    """A process without a contribution sends as many numbers as the others, or the run hangs."""
    shapes = []
    for contribution in ({}, {"alignment": Ratio(1.0, 1)}):
        metrics = MetricAccumulator(CPU)
        metrics.add(contribution)
        metrics.take(lambda sums: shapes.append(sums.shape) or sums)  # type: ignore[func-returns-value]
    assert shapes == [(2, len(NAMES))] * 2


def test_standard_deviation_comes_from_moments() -> None:
    metrics = MetricAccumulator(CPU)
    values = torch.randn(40)
    for part in (values[:30], values[30:]):
        metrics.add(
            {
                "advantages_mean": Ratio(part.sum(), len(part)),
                "advantages_square": Ratio(part.square().sum(), len(part)),
            }
        )
    means = metrics.take(as_they_are)
    assert means.keys() == {"ebft/advantages_std"}
    assert means["ebft/advantages_std"] == pytest.approx(float(values.std(unbiased=False)))


def test_clear_removes_all_sums() -> None:
    metrics = MetricAccumulator(CPU)
    metrics.add({"kl": Ratio(1.0, 1)})
    metrics.clear()
    assert metrics.take(as_they_are) == {}


def test_block_metrics_leave_out_blocks_that_do_not_exist() -> None:
    layout = layout_of(9, 4, 3)
    exists = layout.blocks.exists
    assert exists.sum(dim=1).tolist() == [3, 1, 0]
    rewards = feature_matching_rewards(
        torch.randn(3, 3, 3, 6), torch.randn(3, 3, 6), diversity_coef=0.5
    )
    advantages = compute_advantages(rewards)
    advantages[0, :, 1] = 0.0
    metrics = MetricAccumulator(CPU)
    metrics.add(block_metrics(rewards, advantages, layout))
    means = metrics.take(as_they_are)
    pairs = exists.nonzero().tolist()

    def mean_of(values: Tensor) -> float:
        return float(torch.stack([values[row, :, block] for row, block in pairs]).mean())

    assert means["ebft/alignment"] == pytest.approx(mean_of(rewards.alignment), abs=1e-6)
    assert means["ebft/diversity"] == pytest.approx(mean_of(rewards.diversity), abs=1e-6)
    assert means["ebft/mean_reward"] == pytest.approx(mean_of(rewards.reward), abs=1e-6)
    cfm = torch.stack([rewards.cfm_loss[row, block] for row, block in pairs]).mean()
    assert means["ebft/cfm_loss"] == pytest.approx(float(cfm), abs=1e-6)
    spread = torch.stack([advantages[row, :, block] for row, block in pairs]).std(unbiased=False)
    assert means["ebft/advantages_std"] == pytest.approx(float(spread), abs=1e-6)
    assert means["ebft/zero_advantage_groups"] == 0.25


def test_rollout_metrics_count_repeats_and_blocks() -> None:
    layout = layout_of(9, 4, 3)
    tokens = torch.arange(3 * 3 * 3 * 2).view(3, 3, 3, 2)
    tokens[0, 1, 0] = tokens[0, 0, 0]  # one repeat
    tokens[0, :, 2] = 7  # two repeats
    tokens[1, 2, 0, 0] = tokens[1, 0, 0, 0]  # half a repeat is none
    tokens[2] = 7  # blocks that do not exist
    metrics = MetricAccumulator(CPU)
    metrics.add(rollout_metrics(tokens, layout))
    means = metrics.take(as_they_are)
    assert means["ebft/duplicate_rollouts"] == pytest.approx(3 / 12)
    assert means["ebft/blocks_per_document"] == pytest.approx(4 / 3)
    assert means["ebft/documents_without_blocks"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("lengths", [(9, 4, 3), (3, 2), (30, 4), (9,) * 7])
def test_documents_with_blocks(lengths: tuple[int, ...]) -> None:
    layout = layout_of(*lengths)
    assert float(documents_with_blocks(layout)) == sum(length >= 4 for length in lengths)


def test_token_metrics_estimate_the_entropy() -> None:
    layout = layout_of(9, 4, 3)
    log_probs = -torch.rand(3, 3, 3, 2) - 0.1
    log_probs[2] = float("-inf")  # does not exist
    metrics = MetricAccumulator(CPU)
    metrics.add(
        token_metrics(
            log_probs,
            torch.tensor(0.5),
            torch.tensor(2.0),
            None,
            layout,
        )
    )
    means = metrics.take(as_they_are)
    exists = layout.blocks.exists
    rollouts = [log_probs[row, :, block] for row, block in exists.nonzero().tolist()]
    assert means["ebft/entropy"] == pytest.approx(-float(torch.stack(rollouts).mean()), abs=1e-6)
    assert means["ebft/rl_loss"] == 0.5
    assert means["ebft/ce_loss"] == 2.0
    assert "ebft/kl" not in means


def test_replies_that_get_no_block_are_a_metric() -> None:
    """Of replies at tokens 5 to 9, 12 to 14 and 17 to 20, the second is shorter than a rollout and
    the third lies between the anchors 13 and 21.
    """
    labels = torch.full((1, 30), -100)
    for start, end in ((5, 10), (12, 15), (17, 21)):
        labels[0, start:end] = 1
    documents = Documents.from_inputs({"input_ids": torch.ones_like(labels), "labels": labels})
    blocks = find_blocks(documents, stride=8, context_length=2, generate_max_len=4)
    assert blocks.position.tolist() == [[5]]
    layout = PackedLayout(documents, blocks, 3, 4)
    metrics = MetricAccumulator(CPU)
    metrics.add(rollout_metrics(torch.zeros(layout.rollout_shape, dtype=torch.long), layout))
    assert metrics.take(as_they_are)["ebft/replies_without_blocks"] == pytest.approx(2 / 3)
