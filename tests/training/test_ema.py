"""Averaged weights: closed forms, what is evaluated and saved, resuming."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_ebft import EBFTTrainer
from hf_ebft.data import EBFTDataCollator
from hf_ebft.training.ema import EMACallback, WeightAverage
from tests.support.tiny import assert_same_tensors, config, logged, texts, tiny_llama, weights_of

DECAY = 0.7


class RecordWeights(TrainerCallback):
    """Keeps the trainable weights before training and after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Keep W_0."""
        self.steps.append(trainable(model))

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Keep W_t."""
        self.steps.append(trainable(model))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight for name, weight in weights_of(model).items() if name in names}


def closed_form(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """decay^t W_0 + (1 - decay) sum over i of decay^(t - i) W_i, in float64."""
    last = len(steps) - 1
    factors = [decay**last] + [(1 - decay) * decay ** (last - i) for i in range(1, last + 1)]
    assert sum(factors) == pytest.approx(1)
    return {
        name: sum(
            (f * step[name].double() for f, step in zip(factors, steps, strict=True)),
            start=torch.zeros(()),
        ).float()
        for name in steps[0]
    }


def make_trainer(folder: Path, *, peft: bool = False, **settings: Any) -> EBFTTrainer:
    values: dict[str, Any] = {"max_steps": 4, "ema_decay": DECAY, "ce_coef": 0.1}
    recorder = RecordWeights()
    trainer = EBFTTrainer(
        tiny_llama(),
        config(folder, **(values | settings)),
        train_dataset=texts(21, 18, 30, 14),
        eval_dataset=texts(25, 19, 13, seed=1),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if peft else None,
        callbacks=[recorder],
    )
    trainer.recorder = recorder
    return trainer


def averages(trainer: EBFTTrainer) -> dict[str, Tensor]:
    assert trainer.averaging is not None
    with trainer.averaging.applied():
        return trainable(trainer.model)


# ---- The average ----------------------------------------------------------------------------


def test_averages_of_a_few_steps_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    average = WeightAverage(model, 0.75)
    for value in (6.0, 10.0):
        nn.init.constant_(model.weight, value)
        average.update()
    with average.applied():
        assert model.weight.item() == pytest.approx(0.75 * (0.75 * 2 + 0.25 * 6) + 0.25 * 10)
    assert model.weight.item() == 10.0


def test_half_precision_weights_are_averaged_in_float32() -> None:
    """In bfloat16 the average of 1 and 1.0078 would stay at 1 with this decay, forever."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, 0.99)
    nn.init.constant_(model.weight, 1.0078125)
    for _ in range(100):
        average.update()
    expected = 1.0078125 - 0.0078125 * 0.99**100
    assert average.state()["weight"].item() == pytest.approx(expected, abs=1e-6)
    with average.applied():
        assert model.weight.dtype == torch.bfloat16


def test_own_weights_come_back_after_an_error() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    nn.init.constant_(model.weight, 3.0)
    before = weights_of(model)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert_same_tensors(weights_of(model), before, relative=0)


def test_tied_weights_stay_tied() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    average = WeightAverage(model, 0.5)
    with average.applied():
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any("lm_head" in name for name in average.state())


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"ema_decay={decay} must be above 0"):
        WeightAverage(nn.Linear(1, 1), decay)


def test_frozen_models_are_refused() -> None:
    with pytest.raises(ValueError, match="no trainable weights"):
        WeightAverage(nn.Linear(1, 1).requires_grad_(False), 0.9)


def test_averages_of_other_weights_are_refused() -> None:
    average = WeightAverage(nn.Linear(2, 2), 0.9)
    with pytest.raises(ValueError, match=r"1 names or shapes differ, such as \['bias'\]"):
        average.load({"weight": torch.zeros(2, 2)})


# ---- During training --------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [False, True])
def test_training_averages_what_it_trains(tmp_path: Path, peft: bool) -> None:
    trainer = make_trainer(tmp_path, peft=peft)
    trainer.train()
    steps = trainer.recorder.steps
    assert len(steps) == 5
    assert all(("lora" in name) == peft for name in steps[0])
    assert_same_tensors(averages(trainer), closed_form(steps, DECAY), relative=1e-6)


def test_averaging_does_not_change_training(tmp_path: Path) -> None:
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    runs = [
        make_trainer(tmp_path / str(decay), ema_decay=decay, **evaluating)
        for decay in (None, DECAY)
    ]
    for trainer in runs:
        trainer.train()
    plain, averaged = runs
    assert plain.averaging is None
    assert_same_tensors(weights_of(averaged.model), weights_of(plain.model), relative=0)
    for name in ("loss", "eval_loss", "eval_ebft/cfm_loss"):
        assert logged(averaged, name) == logged(plain, name)


def test_the_average_is_evaluated_beside_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    both = {"eval_ema_loss", "eval_ema_ebft/cfm_loss", "eval_loss"}
    assert all(len(logged(trainer, name)) == 2 for name in both)
    again = trainer.evaluate()
    assert both <= again.keys()
    assert trainer.averaging is not None
    trainer.averaging.evaluate = False
    with trainer.averaging.applied():
        by_hand = trainer.evaluate()
    assert by_hand["eval_loss"] == again["eval_ema_loss"] != again["eval_loss"]
    assert by_hand["eval_ebft/cfm_loss"] == again["eval_ema_ebft/cfm_loss"]


def test_several_evaluation_datasets(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.eval_dataset = {"long": texts(30, 25), "short": texts(12, 13)}
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_long_ema_loss", "eval_short_ema_loss"} <= metrics.keys()
    other = trainer.evaluate(texts(20), metric_key_prefix="test")
    assert not any("ema" in name for name in other)


def test_a_metric_of_the_average_can_choose_the_best_model(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_loss",
        greater_is_better=False,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
    trainer.train()
    assert trainer.state.best_metric == min(logged(trainer, "eval_ema_loss"))


def test_nothing_is_evaluated_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert not any("ema" in name for name in trainer.evaluate())
    assert trainer.averaging is not None
    with pytest.raises(RuntimeError, match="before training"), trainer.averaging.applied():
        pass


# ---- Saving and resuming ------------------------------------------------------------------------


def saving(**settings: Any) -> dict[str, Any]:
    return {"save_strategy": "steps", "save_steps": 2} | settings


@pytest.mark.parametrize("peft", [False, True])
def test_a_resumed_run_continues_the_average(tmp_path: Path, peft: bool) -> None:
    whole = make_trainer(tmp_path / "whole", peft=peft, **saving())
    whole.train()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", moved)
    resumed = make_trainer(tmp_path / "resumed", peft=peft, **saving())
    resumed.train(resume_from_checkpoint=str(moved))
    assert_same_tensors(weights_of(resumed.model), weights_of(whole.model), relative=0)
    assert_same_tensors(averages(resumed), averages(whole), relative=0)


def test_resuming_finds_the_last_checkpoint_without_a_path(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, **saving())
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = make_trainer(tmp_path, **saving())
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(averages(resumed), averages(whole), relative=0)


def test_the_saved_average_is_a_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **saving())
    trainer.train()
    expected = closed_form(trainer.recorder.steps[:3], DECAY)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2" / "ema" / "model")
    assert_same_tensors(weights_of(saved), expected, relative=1e-6)
    state = load_file(tmp_path / "checkpoint-2" / "ema" / "state.safetensors")
    assert_same_tensors(state, expected, relative=1e-6)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "ema" / "model")
    assert_same_tensors(weights_of(final), averages(trainer), relative=0)


def test_the_saved_average_of_adapters_is_adapters(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, peft=True, **saving())
    trainer.train()
    saved = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ema" / "model", is_trainable=True)
    assert_same_tensors(trainable(saved), averages(trainer), relative=0)
    # Directly below a checkpoint, Trainer would resume it as a second adapter of the policy.
    resumed = make_trainer(tmp_path, peft=True, **saving(max_steps=5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert list(resumed.model.peft_config) == ["default"]


def test_a_checkpoint_with_save_only_model_has_no_state(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2, **saving(save_only_model=True)).train()
    folder = tmp_path / "checkpoint-2" / "ema"
    assert (folder / "model").is_dir()
    assert not (folder / "state.safetensors").exists()


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, ema_decay=None, max_steps=2, **saving()).train()
    resumed = make_trainer(tmp_path, **saving())
    with pytest.raises(ValueError, match=r"resumes at step 2, but there is no average at .*ema"):
        resumed.train(resume_from_checkpoint=True)


def test_the_average_of_another_step_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, **saving()).train()
    old, new = (tmp_path / f"checkpoint-{step}" / "ema" for step in (2, 4))
    shutil.copy(old / "state.safetensors", new / "state.safetensors")
    with pytest.raises(ValueError, match="the average at step 2, but training resumes at step 4"):
        make_trainer(tmp_path, **saving()).train(resume_from_checkpoint=True)


# ---- Other trainers -----------------------------------------------------------------------------


def test_the_callback_works_with_any_trainer(tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=3,
        save_strategy="no",
        learning_rate=1e-2,
    )
    rows = [row | {"labels": row["input_ids"]} for row in texts(12, 12, 12)]
    recorder = RecordWeights()
    trainer = Trainer(
        tiny_llama(),
        args,
        data_collator=EBFTDataCollator(),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[recorder],
    )
    callback = EMACallback(trainer, DECAY)
    trainer.add_callback(callback)
    trainer.train()
    with callback.applied():
        averaged = weights_of(trainer.model)
    assert_same_tensors(averaged, closed_form(recorder.steps, DECAY), relative=1e-6)
    assert "eval_ema_loss" in trainer.evaluate()


def test_a_hyperparameter_search_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert trainer.averaging is not None
    trainer.state.is_hyper_param_search = True
    with pytest.raises(ValueError, match="hyperparameter search"):
        trainer.averaging.on_train_begin(trainer.args, trainer.state, trainer.control)
