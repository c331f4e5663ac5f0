"""Seconds by a clock that is only pretended, steps as Trainer counts them, memory that is seen."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_ebft import EBFTTrainer
from hf_ebft.preflight import cost
from hf_ebft.preflight.cost import StepTimer, measure_cost, total_steps
from hf_ebft.preflight.stand_in import stand_in
from tests.support.tiny import assert_same_tensors, config, texts, tiny_llama, weights_of


def make_trainer(folder: Path, rows: int = 12, **settings: Any) -> EBFTTrainer:
    return EBFTTrainer(
        model=tiny_llama(),
        args=config(folder, **settings),
        train_dataset=texts(*[12] * rows),
    )


def test_a_step_is_its_micro_batches_and_the_optimizer() -> None:
    moments = iter([0.0, 10.0, 11.0, 20.0, 24.0, 25.0, 30.0, 38.0, 41.0])
    timer = StepTimer(lambda: next(moments))
    # The clock is read when a step begins, when its gradients are there, and when it is done:
    # warm-up 10 + 1 seconds, then 4 + 1 and 8 + 3.
    for step in (1, 2, 3):
        timer.on_step_begin(None, None, None)
        timer.on_pre_optimizer_step(None, None, None)
        if step == 1:
            next(moments)
        timer.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert timer.micro_batches == [4.0, 8.0]
    assert timer.optimizer == [1.0, 3.0]
    assert timer.seconds(measured=2, wanted=2) == 6 + 2
    assert timer.seconds(measured=2, wanted=10) == 30 + 2


def test_the_clock_of_a_run(tmp_path: Path) -> None:
    """A clock that goes on by a second whenever it is read."""
    ticks = iter(range(1000))
    trainer = make_trainer(tmp_path, max_steps=50, gradient_accumulation_steps=8)
    before = weights_of(trainer.model)
    with stand_in(trainer) as own:
        found = measure_cost(own, processes=4, clock=lambda: float(next(ticks)))
    assert_same_tensors(weights_of(trainer.model), before, relative=0)
    assert found.seconds == 8 / 2 * 1 + 1, "of two micro-batches, and the optimizer"
    assert found.steps == 50
    assert found.hours == pytest.approx(50 * 5 / 3600)
    assert found.rows_per_step == 2 * 8 * 4
    assert found.rows == 50 * 64
    assert set(found.phases) == {"rollout", "features", "training"}
    assert all(seconds > 0 for seconds in found.phases.values())
    assert 0 < found.memory < found.memory_there
    assert trainer.args.gradient_accumulation_steps == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 3},
        {"num_train_epochs": 2.5, "gradient_accumulation_steps": 4},
        {"num_train_epochs": 1, "per_device_train_batch_size": 5},
        {"num_train_epochs": 1, "per_device_train_batch_size": 5, "dataloader_drop_last": True},
        {"max_steps": 7},
    ],
)
def test_steps_are_counted_as_by_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, **settings)
    counted = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert total_steps(trainer, processes=1) == counted


def test_more_processes_take_fewer_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    assert total_steps(trainer, processes=3) == 4
    assert total_steps(trainer, processes=100) == 2


def test_a_stream_has_no_number_of_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=7)
    trainer.train_dataset = iter(())
    trainer.args.max_steps = -1
    assert total_steps(trainer, processes=1) is None


def test_a_step_without_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = make_trainer(tmp_path, max_steps=7)
    with stand_in(trainer) as own:
        monkeypatch.setattr(type(own), "compute_loss", run_out)
        found = measure_cost(own)
    assert not found.fits
    assert math.isnan(found.seconds)


def test_the_peak_of_memory_is_seen() -> None:
    with cost._peak(torch.device("cpu")) as empty:
        pass
    with cost._peak(torch.device("cpu")) as peak:
        held = torch.ones(100 * 2**18)  # 100 MiB
        del held
    assert peak.bytes - empty.bytes > 50 * 2**20
