"""A preflight leaves no trace: the run after it is the run without it, bit for bit."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from hf_ebft import EBFTTrainer
from hf_ebft.preflight import preflight
from hf_ebft.preflight.stand_in import stand_in, weights_kept
from tests.support.tiny import (
    assert_same_tensors,
    config,
    logged,
    texts,
    tiny_llama,
    weights_of,
)


def make_trainer(folder: Path, *, peft: bool = False, **arguments: Any) -> EBFTTrainer:
    torch.manual_seed(0)
    return EBFTTrainer(
        # Dropout draws from torch's global generator, as the order of the data does.
        model=tiny_llama(attention_dropout=0.3),
        args=config(folder, **({"max_steps": 3, "use_whitening": False} | arguments)),
        train_dataset=texts(*[18] * 8),
        peft_config=LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear")
        if peft
        else None,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"whitening_space": "corpus", "use_whitening": True},
        pytest.param({"peft": True}, marks=pytest.mark.slow),
        pytest.param({"advantage_estimator": "fitted"}, marks=pytest.mark.slow),
    ],
)
def test_training_after_a_preflight_is_training_without(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = settings | {"gradient_accumulation_steps": 2}
    plain, looked_at = (make_trainer(tmp_path, **settings) for _ in range(2))
    torch.manual_seed(1)
    plain.train()
    torch.manual_seed(1)
    before = weights_of(looked_at.model)
    preflight(looked_at, documents=4)
    assert_same_tensors(weights_of(looked_at.model), before, relative=0)
    looked_at.train()
    assert_same_tensors(weights_of(looked_at.model), weights_of(plain.model), relative=0)
    assert logged(looked_at, "loss") == logged(plain, "loss")
    assert logged(looked_at, "ebft/cfm_loss") == logged(plain, "ebft/cfm_loss")
    assert list(tmp_path.iterdir()) == []


def test_modes_gradients_and_random_numbers_are_kept(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.eval()
    trainer.model.model.layers[0].train()
    modes = [module.training for module in trainer.model.modules()]
    weight = trainer.model.lm_head.weight
    weight.grad = torch.ones_like(weight)
    seen: list[str] = []
    trainer.add_callback(_Witness(seen))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with stand_in(trainer) as own, weights_kept(own.model):
        own.args.max_steps = 2
        own.train()
        torch.rand(3), np.random.rand(3), random.random()
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(weight.grad, torch.ones_like(weight))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == states
    assert seen == [], "callbacks of the user were told of steps that are no part of the run"
    assert trainer.optimizer is None
    assert trainer.args.max_steps == 3
    assert trainer.state.global_step == 0


class _Witness(TrainerCallback):
    """Writes down what it is told of."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("step")

    def on_ebft_outputs(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("outputs")


def test_an_optimizer_of_the_user_is_kept(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    trainer = EBFTTrainer(
        model=model,
        args=config(tmp_path, max_steps=3),
        train_dataset=texts(*[18] * 8),
        optimizers=(optimizer, schedule),
    )
    preflight(trainer, documents=4)
    assert not optimizer.state
    assert schedule.last_epoch == 0
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2]


def test_mixed_precision_leaves_the_forward_pass_as_it_was(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=True)
    forward = trainer.model.forward
    preflight(trainer, documents=4)
    assert trainer.model.forward == forward
    assert "_original_forward" not in vars(trainer.model)


def test_a_trainer_that_trains_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.is_in_train = True
    with pytest.raises(ValueError, match="call it before train"):
        preflight(trainer)


def test_another_trainer_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"EBFTTrainer \(strided mode\), not a object.*--mode strided"
    ):
        preflight(object())  # type: ignore[arg-type]


def test_a_trainer_without_text_is_refused(tmp_path: Path) -> None:
    trainer = EBFTTrainer(
        model=tiny_llama(), args=config(tmp_path, max_steps=1), eval_dataset=texts(18)
    )
    with pytest.raises(ValueError, match="give it a train_dataset"):
        preflight(trainer)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"documents": 3}, "documents=3 is too few for an interval"),
        ({"minutes": 0.0}, "minutes=0.0 leaves no time"),
        ({"processes": 0}, "processes=0 must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        preflight(make_trainer(tmp_path), **numbers)


def test_text_without_room_for_blocks_is_refused(tmp_path: Path) -> None:
    trainer = EBFTTrainer(
        model=tiny_llama(), args=config(tmp_path), train_dataset=texts(5, 5, 5, 20)
    )
    with pytest.raises(ValueError, match=r"Only 1 of 4 rows have room.*= 7 tokens"):
        preflight(trainer)
