"""What a run is optimized with when nothing is set: the paper's recipe, by what is trained."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_ebft import EBFTConfig, EBFTTrainer
from tests.support.tiny import assert_same_tensors, logged, texts, tiny_llama, weights_of

ROWS = texts(20, 24, 18, 22)
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
}
SHORT: dict[str, Any] = {"stride": 4, "context_length": 4, "generate_max_len": 3}


def settings(folder: Path, **changes: Any) -> EBFTConfig:
    return EBFTConfig(str(folder), **(QUIET | SHORT | {"verify_packing": False} | changes))


def adapted(**options: Any) -> nn.Module:
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", **options))


def added_by_transformers() -> PreTrainedModel:
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize(
    ("make_model", "rate"),
    [(tiny_llama, 1e-6), (adapted, 1e-5), (added_by_transformers, 1e-5)],
    ids=["all weights", "PEFT", "adapters of transformers"],
)
def test_the_rate_follows_what_is_trained(make_model: Any, rate: float, tmp_path: Path) -> None:
    args = settings(tmp_path)
    assert args.learning_rate is None
    trainer = EBFTTrainer(make_model(), args, train_dataset=ROWS)
    assert trainer.args is args and args.learning_rate == rate


def test_peft_config_and_model_init_decide_the_rate_too(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear")
    wrapped = EBFTTrainer(tiny_llama(), settings(tmp_path), train_dataset=ROWS, peft_config=lora)
    assert wrapped.args.learning_rate == 1e-5
    made = EBFTTrainer(None, settings(tmp_path), train_dataset=ROWS, model_init=lambda: adapted())
    assert made.args.learning_rate == 1e-5


def test_a_rate_that_is_set_stays(tmp_path: Path) -> None:
    """Even one that is the default of the other kind."""
    args = settings(tmp_path, learning_rate=1e-6)
    assert EBFTTrainer(adapted(), args, train_dataset=ROWS).args.learning_rate == 1e-6


def test_arguments_that_are_used_twice_get_the_rate_of_each_model(tmp_path: Path) -> None:
    args = settings(tmp_path)
    EBFTTrainer(adapted(), args, train_dataset=ROWS)
    assert EBFTTrainer(tiny_llama(), args, train_dataset=ROWS).args.learning_rate == 1e-6
    args.learning_rate = 3e-4
    assert EBFTTrainer(adapted(), args, train_dataset=ROWS).args.learning_rate == 3e-4


def test_the_rate_that_was_filled_in_is_what_is_stored(tmp_path: Path) -> None:
    args = settings(tmp_path)
    EBFTTrainer(tiny_llama(), args, train_dataset=ROWS)
    assert args.to_dict()["learning_rate"] == 1e-6
    assert pickle.loads(pickle.dumps(args)).learning_rate == 1e-6
    assert dataclasses.replace(args, stride=5).learning_rate == 1e-6


def test_the_optimizer_is_the_papers(tmp_path: Path) -> None:
    """Constant after a warm-up of 3 % of the steps; AdamW with betas 0.9 and 0.95."""
    trainer = EBFTTrainer(tiny_llama(), settings(tmp_path, max_steps=100), train_dataset=ROWS)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None
    (decayed, plain) = trainer.optimizer.param_groups
    assert decayed["betas"] == plain["betas"] == (0.9, 0.95)
    rates = []
    for _ in range(100):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([0.0, 1e-6 / 3, 2e-6 / 3, *[1e-6] * 97])


def test_training_arguments_that_are_brought_along_stay(tmp_path: Path) -> None:
    """The optimizer of a `Trainer` with the same arguments: same classes, rates and betas."""
    args = TrainingArguments(str(tmp_path), max_steps=3, **QUIET)
    before = args.to_dict()
    ours = EBFTTrainer(tiny_llama(), args, train_dataset=texts(60, 70))
    theirs = Trainer(tiny_llama(), args, train_dataset=texts(60, 70))
    assert args.to_dict() == before
    for trainer in (ours, theirs):
        trainer.create_optimizer_and_scheduler(num_training_steps=10)
    assert ours.optimizer is not None and theirs.optimizer is not None
    for group, expected in zip(
        ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True
    ):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in expected.items() if k != "params"
        }
    assert args.learning_rate == 5e-5


def test_a_run_without_settings_is_the_run_with_the_papers(tmp_path: Path) -> None:
    unset = EBFTTrainer(tiny_llama(), settings(tmp_path, max_steps=4), train_dataset=ROWS)
    unset.train()
    recipe = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.03,
        "adam_beta2": 0.95,
    }
    given = EBFTTrainer(tiny_llama(), settings(tmp_path, max_steps=4, **recipe), train_dataset=ROWS)
    given.train()
    assert logged(unset, "learning_rate") == logged(given, "learning_rate")
    assert_same_tensors(weights_of(unset.model), weights_of(given.model), relative=0)
    start = weights_of(tiny_llama())
    assert any(not torch.equal(start[n], w) for n, w in weights_of(unset.model).items())
