"""What a subclass of `EBFTTrainer` may override, and that training follows it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_ebft import EBFTTrainer, Rollouts
from hf_ebft.training.outputs import EBFTOutput, Scores
from tests.support.tiny import batch_of, config, gradients, texts, tiny_llama


class NoAdvantages(EBFTTrainer):
    """Every rollout is as good as the others."""

    def score_rollouts(self, rollouts: Rollouts) -> Scores:
        """The same rewards with advantages of zero."""
        scores = super().score_rollouts(rollouts)
        return dataclasses.replace(scores, advantages=torch.zeros_like(scores.advantages))


def test_advantages_of_a_subclass_are_trained_on(tmp_path: Path) -> None:
    """The studies compare baselines in this way."""
    batch = batch_of(texts(24, 20))
    _, found = gradients(EBFTTrainer(tiny_llama(), config(tmp_path)), batch)
    assert any(bool(gradient.any()) for gradient in found.values())
    _, found = gradients(NoAdvantages(tiny_llama(), config(tmp_path)), batch)
    assert not any(bool(gradient.any()) for gradient in found.values())


class Ones(EBFTTrainer):
    """All rollouts are the token 1."""

    def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
        """The sampled ones with other tokens."""
        rollouts = super().sample_rollouts(model, inputs)
        return dataclasses.replace(rollouts, tokens=torch.ones_like(rollouts.tokens))


def test_rollouts_of_a_subclass_are_scored_and_trained_on(tmp_path: Path) -> None:
    """Their log-probabilities are not those of the tokens that were sampled."""
    for chunk in (10**6, 6):
        trainer = Ones(tiny_llama(), config(tmp_path, training_chunk_size=chunk, temperature=1.0))
        row = texts(12)[0]["input_ids"]
        _, outputs = trainer.compute_loss(trainer.model, batch_of([{"input_ids": row}]), True)
        assert isinstance(outputs, EBFTOutput)
        ids = torch.tensor([[*row[:4], 1, 1, 1]])  # the first prefix and its rollout
        logits = trainer.model(input_ids=ids).logits.log_softmax(-1)
        expected = logits[0, 3:6, 1]
        torch.testing.assert_close(outputs.log_probs[0, 0, 0], expected, rtol=0, atol=1e-5)
