"""Weights of the loss's parts that move over a run of strided mode."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ebft import EBFTTrainer
from hf_ebft.training.outputs import Scores
from tests.support.tiny import (
    Listener,
    assert_same_tensors,
    config,
    logged,
    texts,
    tiny_llama,
    weights_of,
)

ROWS = texts(30, 22, 27, 18, 25, 33, 21, 29)


def make(folder: Path, **settings: Any) -> tuple[EBFTTrainer, Listener]:
    listener = Listener()
    args = config(folder, **({"max_steps": 5} | settings))
    trainer = EBFTTrainer(
        tiny_llama(), args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[listener]
    )
    return trainer, listener


def run(folder: Path, **settings: Any) -> tuple[EBFTTrainer, Listener]:
    trainer, listener = make(folder, **settings)
    trainer.train()
    return trainer, listener


def test_a_moving_weight_is_logged_and_used(tmp_path: Path) -> None:
    """One value in all micro-batches of a step; the loss has it; constant ones are not logged."""
    trainer, listener = run(
        tmp_path,
        ce_coef=0.2,
        ce_coef_schedule="linear",
        ce_coef_final=1.0,
        kl_coef=0.5,
        rl_coef=2.0,
        rl_coef_schedule="cosine",
        rl_coef_final=0.0,
        gradient_accumulation_steps=2,
    )
    ce = [0.2, 0.4, 0.6, 0.8, 1.0]
    rl = [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0]
    assert logged(trainer, "ebft/ce_coef") == pytest.approx(ce)
    assert logged(trainer, "ebft/rl_coef") == pytest.approx(rl)
    assert logged(trainer, "ebft/kl_coef") == []
    weights = [(o.coefficients.rl, o.coefficients.ce) for o in listener.outputs]
    assert weights[::2] == weights[1::2]
    assert torch.tensor(weights[::2]).T.tolist() == [pytest.approx(rl), pytest.approx(ce)]
    names = ("ebft/rl_loss", "ebft/ce_loss", "ebft/kl")
    parts = torch.tensor([logged(trainer, name) for name in names])
    factors = torch.tensor([rl, ce, [0.5] * 5])
    expected = (factors * parts).sum(dim=0).tolist()
    # The parts are means over documents and the steps have equally many, so the log is additive.
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_under_sgd_a_scheduled_weight_is_a_scheduled_rate(
    accumulation: int, tmp_path: Path
) -> None:
    """Cross-entropy alone: plain SGD cannot tell the factor of a loss from that of the rate."""
    common: dict[str, Any] = {
        "rl_coef": 0.0,
        "optim": "sgd",
        # At 0.5 steps overshoot and amplify the rounding of either way to about 2e-6 and more.
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": accumulation,
    }
    scheduled, _ = run(
        tmp_path,
        ce_coef=1.0,
        ce_coef_schedule="linear",
        ce_coef_final=0.2,
        lr_scheduler_type="constant",
        warmup_steps=0,
        **common,
    )
    plain, _ = make(tmp_path, ce_coef=1.0, **common)
    plain.optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.1)
    plain.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        plain.optimizer, lambda step: 1.0 - 0.2 * step
    )
    plain.train()
    assert logged(plain, "learning_rate") == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    before = weights_of(tiny_llama())
    moved = weights_of(scheduled.model)
    assert any(not moved[name].allclose(before[name], atol=1e-3) for name in before)
    assert_same_tensors(moved, weights_of(plain.model), relative=1e-6)


class CountedScores(EBFTTrainer):
    """Counts the passes of the feature network's head."""

    def score_rollouts(self, rollouts: Any) -> Scores:
        """Keep whether there were log-probabilities of the reference."""
        scores = super().score_rollouts(rollouts)
        self.with_reference = [
            *getattr(self, "with_reference", []),
            scores.reference_log_probs is not None,
        ]
        return scores


@pytest.mark.parametrize("chunk", [10**6, 6], ids=["one pass", "chunks"])
def test_weights_that_start_or_end_at_zero_are_computed_where_they_count(
    chunk: int, tmp_path: Path
) -> None:
    args = config(
        tmp_path,
        max_steps=4,
        training_chunk_size=chunk,
        ce_coef=0.0,
        ce_coef_schedule="linear",
        ce_coef_final=0.3,
        kl_coef=0.6,
        kl_coef_schedule="linear",
        kl_coef_final=0.0,
    )
    trainer, listener = CountedScores(tiny_llama(), args, train_dataset=ROWS), Listener()
    trainer.add_callback(listener)
    trainer.train()
    assert [output.ce_loss is not None for output in listener.outputs] == [False, True, True, True]
    assert [output.kl is not None for output in listener.outputs] == [True, True, True, False]
    assert trainer.with_reference == [True, True, True, False]
    assert len(logged(trainer, "ebft/ce_loss")) == len(logged(trainer, "ebft/kl")) == 3
    assert logged(trainer, "ebft/ce_coef") == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_to_the_same_value_changes_nothing(schedule: str, tmp_path: Path) -> None:
    """To the bit."""
    scheduled, _ = run(
        tmp_path,
        ce_coef=0.1,
        ce_coef_schedule=schedule,
        ce_coef_final=0.1,
        rl_coef_schedule=schedule,
        rl_coef_final=1.0,
    )
    constant, _ = run(tmp_path, ce_coef=0.1, ce_coef_schedule="constant")
    assert_same_tensors(weights_of(scheduled.model), weights_of(constant.model), relative=0)
    assert logged(scheduled, "ebft/ce_coef") == [0.1] * 5
    assert not logged(constant, "ebft/ce_coef")


def test_a_resumed_run_goes_on_with_the_schedule(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "ce_coef": 0.0,
        "ce_coef_schedule": "cosine",
        "ce_coef_final": 0.5,
        "kl_coef": 0.2,
        "kl_coef_schedule": "linear",
        "kl_coef_final": 0.0,
    }
    whole, _ = run(tmp_path / "whole", **settings)
    again, _ = make(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(again, "ebft/ce_coef") == logged(whole, "ebft/ce_coef")
    assert_same_tensors(weights_of(again.model), weights_of(whole.model), relative=0)


def test_evaluation_leaves_the_schedule_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ce_coef_schedule": "linear", "ce_coef_final": 0.4}
    without, _ = run(tmp_path, **settings)
    evaluated, _ = run(
        tmp_path, **settings, eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    assert logged(evaluated, "ebft/ce_coef") == logged(without, "ebft/ce_coef")
    assert_same_tensors(weights_of(evaluated.model), weights_of(without.model), relative=0)


def test_a_loss_by_hand_has_the_weights_of_the_first_step(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, ce_coef=0.25, ce_coef_schedule="linear", ce_coef_final=0.0)
    batch = trainer.data_collator([dict(row) for row in ROWS[:2]])
    result = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert isinstance(result, tuple)
    loss, output = result
    assert isinstance(loss, Tensor) and output.coefficients.ce == 0.25
    assert trainer.state.max_steps == 0
    assert isinstance(trainer.model, nn.Module)
