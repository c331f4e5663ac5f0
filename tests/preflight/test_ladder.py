"""The ladder against rewards whose order is known, and against scores of groups made by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_ebft import EBFTTrainer, Rollouts
from hf_ebft.preflight.budget import Deadline
from hf_ebft.preflight.documents import choose_batches, window_tokens
from hf_ebft.preflight.ladder import RUNGS, RewardCheck, check_rewards, pair_accuracy
from hf_ebft.preflight.stand_in import stand_in
from hf_ebft.training.outputs import Scores
from tests.support.tiny import VOCABULARY, config, texts, tiny_llama

TRUTH, AT_07, AT_1, OTHER, RANDOM = RUNGS


class TokensOfTheText(EBFTTrainer):
    """Rewards a rollout by the share of its tokens that are the text's."""

    def score_rollouts(self, rollouts: Rollouts) -> Scores:
        """Replace rewards."""
        scores = super().score_rollouts(rollouts)
        same = rollouts.tokens == window_tokens(rollouts.layout)[:, None]
        rewards = dataclasses.replace(scores.rewards, reward=same.float().mean(dim=-1))
        return dataclasses.replace(scores, rewards=rewards)


class FirstDigits(EBFTTrainer):
    """Rewards a rollout by how many of its tokens are below 3, the only ones of the text."""

    def score_rollouts(self, rollouts: Rollouts) -> Scores:
        """Replace rewards."""
        scores = super().score_rollouts(rollouts)
        rewards = dataclasses.replace(
            scores.rewards, reward=(rollouts.tokens < 3).float().mean(dim=-1)
        )
        return dataclasses.replace(scores, rewards=rewards)


def climb(
    kind: type[EBFTTrainer], folder: Path, rows: list[dict[str, list[int]]], **settings: object
) -> RewardCheck:
    trainer = kind(model=tiny_llama(), args=config(folder, **settings), train_dataset=rows)
    with stand_in(trainer) as own:
        return check_rewards(own, choose_batches(own, len(rows)), Deadline())


def test_a_reward_for_the_text_puts_it_first(tmp_path: Path) -> None:
    found = climb(TokensOfTheText, tmp_path, texts(24, 24, 24, 24, 5, 24))
    assert (found.rows, found.groups) == (5, 5 * 5)
    assert found.rewards[TRUTH].mean == 1.0
    for worse in RUNGS[1:]:
        accuracy = found.accuracy(TRUTH, worse)
        assert accuracy.mean > 0.95
        assert found.rewards[worse].mean < 0.15
    assert found.without_blocks == pytest.approx(1 / 6)


def test_another_document_and_random_tokens_are_what_they_are_called(tmp_path: Path) -> None:
    rows = texts(24, 20, 22, 24, vocabulary=3)
    found = climb(FirstDigits, tmp_path, rows)
    assert found.rewards[OTHER].mean == 1.0, "all text is of these tokens"
    assert found.accuracy(TRUTH, OTHER).mean == 0.5, "ties count half"
    assert found.rewards[RANDOM].mean == pytest.approx(3 / VOCABULARY, abs=0.05)
    assert found.accuracy(OTHER, RANDOM).mean > 0.9


def test_the_text_of_another_row_is_not_that_of_its_own(tmp_path: Path) -> None:
    rows = [{"input_ids": [number] * 20} for number in range(4)]
    found = climb(TokensOfTheText, tmp_path, rows)
    assert found.rewards[OTHER].mean == 0.0


@pytest.mark.parametrize("use_whitening", [False, True])
def test_each_candidate_is_rewarded_in_its_group(tmp_path: Path, use_whitening: bool) -> None:
    settings = {"use_whitening": use_whitening, "n_samples_per_prompt": 4}
    rows = texts(18, 15, 18, 15)
    found = climb(EBFTTrainer, tmp_path, rows, **settings)
    # The cosine of the text with itself is 1, whitened or not.
    assert found.alignments[TRUTH].mean == pytest.approx(2.0, abs=1e-2)
    trainer = EBFTTrainer(model=tiny_llama(), args=config(tmp_path, **settings), train_dataset=rows)
    by_row = []
    with torch.no_grad(), trainer.random_streams.evaluation():
        for row in rows:
            inputs = {"input_ids": torch.tensor([row["input_ids"]])}
            rollouts = trainer.sample_rollouts(trainer.model, inputs)
            tokens = rollouts.tokens.clone()
            tokens[:, 0] = window_tokens(rollouts.layout)
            scores = trainer.score_rollouts(rollouts.with_tokens(tokens))
            by_row.append(float(scores.rewards.reward[0, 0].mean()))
    assert found.rewards[TRUTH].mean == pytest.approx(np.mean(by_row), abs=1e-5)
    if use_whitening:  # the text is one of the group then: its own whitened image, cosine 1
        assert found.rewards[TRUTH].mean == pytest.approx(2.0, abs=1e-2)


def test_duplicates_are_those_of_a_cold_policy(tmp_path: Path) -> None:
    settings = {"temperature": 1e-4, "n_samples_per_prompt": 4, "use_whitening": False}
    found = climb(EBFTTrainer, tmp_path, texts(*[16] * 4), **settings)
    assert found.duplicates == pytest.approx(0.75, abs=0.02)
    assert found.zero_advantages == pytest.approx(1.0, abs=0.02)


def test_accuracy_is_a_share_of_pairs() -> None:
    better, worse = np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -1.0])
    assert pair_accuracy(better, worse) == (1 + 0.5 + 0 + 1) / 4
