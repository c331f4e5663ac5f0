"""What `StepLog` makes of a step: metrics, seconds, and calls of callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_ebft import EBFTTrainer
from hf_ebft.training.outputs import EBFTOutput
from tests.support.tiny import batch_of, config, texts, tiny_llama


class Listener(TrainerCallback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.outputs: list[EBFTOutput] = []

    def on_ebft_outputs(self, *args: Any, outputs: EBFTOutput, **kwargs: Any) -> None:
        """Once for each micro-batch of training."""
        self.outputs.append(outputs)


def make(folder: Path, **settings: Any) -> tuple[EBFTTrainer, Listener]:
    listener, rows = Listener(), texts(24, 20, 24, 20)
    args = config(folder, **({"per_device_train_batch_size": 1} | settings))
    trainer = EBFTTrainer(
        tiny_llama(), args, train_dataset=rows, eval_dataset=rows, callbacks=[listener]
    )
    return trainer, listener


def test_callbacks_are_told_of_every_micro_batch_of_training(tmp_path: Path) -> None:
    trainer, listener = make(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    trainer.evaluate()
    assert not listener.outputs
    trainer.train()
    assert len(listener.outputs) == 4


def test_metrics_are_means_over_what_was_recorded_since(tmp_path: Path) -> None:
    trainer, listener = make(tmp_path)
    for row in texts(24, 20):
        trainer.compute_loss(trainer.model, batch_of([row]))
    rewards = torch.cat([outputs.rewards.reward.flatten() for outputs in listener.outputs])
    taken = trainer.step_log.take()
    assert taken["ebft/mean_reward"] == pytest.approx(float(rewards.mean()), abs=1e-6)
    assert trainer.step_log.take() == {}


def test_a_restart_forgets(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path)
    trainer.compute_loss(trainer.model, batch_of(texts(24)))
    with trainer.step_log.phase("rollout"):
        pass
    trainer.step_log.restart()
    trainer.step_log.end_batch()
    assert trainer.step_log.take() == {}
