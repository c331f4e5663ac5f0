"""`StepLog` records metrics, seconds, and calls of callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ebft import EBFTTrainer
from hf_ebft.training.step_log import StepLog
from tests.support.tiny import Listener, batch_of, config, texts, tiny_llama


def make(folder: Path, **settings: Any) -> tuple[EBFTTrainer, Listener]:
    listener, rows = Listener(), texts(24, 20, 24, 20)
    args = config(folder, **({"per_device_train_batch_size": 1} | settings))
    trainer = EBFTTrainer(
        tiny_llama(), args, train_dataset=rows, eval_dataset=rows, callbacks=[listener]
    )
    return trainer, listener


def test_callbacks_get_every_micro_batch_of_training(tmp_path: Path) -> None:
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


def test_a_restart_clears_metrics(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path)
    trainer.compute_loss(trainer.model, batch_of(texts(24)))
    with trainer.step_log.phase("rollout"):
        pass
    trainer.step_log.restart()
    trainer.step_log.end_batch()
    assert trainer.step_log.take() == {}


def test_shapes_of_rows_are_counted_and_too_many_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_ebft.training.step_log.MOST_SHAPES", 2)
    trainer, _ = make(tmp_path)
    found = []
    for static in (False, True):
        trainer.step_log = StepLog(trainer, trainer.ebft, static_shapes=static)
        for length in (20, 24, 20, 28, 32):
            trainer.compute_loss(trainer.model, batch_of(texts(length)))
            found.append(trainer.step_log.take().get("ebft/row_shapes"))
        warnings = [record for record in caplog.records if "pad_to_multiple_of" in record.msg]
        assert len(warnings) == static
    # No shape costs anything without compilation, and then nothing is said of them.
    assert found == [None] * 5 + [1, 2, 2, 3, 4]
    assert "have had 3 shapes" in warnings[0].getMessage()


@pytest.mark.parametrize("padding", [None, 16])
def test_a_compiled_run_has_few_shapes(tmp_path: Path, padding: int | None) -> None:
    """Lengths fall into buckets by themselves; what the user sets wins."""
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer, _ = make(tmp_path, pad_to_multiple_of=padding, **options)
    assert trainer.static_shapes
    widths = {
        trainer.read_layout(batch_of(texts(length))).document_width for length in range(12, 60)
    }
    assert widths == ({128} if padding is None else {16, 32, 48, 64})
    plain, _ = make(tmp_path)
    assert plain.read_layout(batch_of(texts(20))).document_width == 20
