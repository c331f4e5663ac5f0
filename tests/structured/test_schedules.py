"""A weight of the cross-entropy that moves over a run of structured mode."""

import pytest
import torch

from hf_ebft.structured import EBFTGRPOConfig
from tests.support.tiny import assert_same_tensors, logged, weights_of
from tests.support.tiny_structured import (
    OnlyCrossEntropy,
    RecordedEBFT,
    config,
    policy,
    rows,
    tokenizer,
)

MOVING = {"ce_coef": 1.0, "ce_coef_schedule": "linear", "ce_coef_final": 0.25}


def make(folder, trainer_class=OnlyCrossEntropy, optimizers=(None, None), **settings):
    return trainer_class(
        policy(),
        config(folder, **({"max_steps": 4} | settings)),
        train_dataset=rows(16),
        eval_dataset=rows(4),
        processing_class=tokenizer(),
        optimizers=optimizers,
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"num_iterations": 2}],
    ids=["one batch", "accumulation", "two passes"],
)
def test_under_sgd_a_scheduled_weight_is_a_scheduled_rate(tmp_path, settings):
    """Plain SGD cannot tell the factor of a loss from that of the rate."""
    common = {"max_grad_norm": 0.0, "beta": 0.0} | settings
    scheduled = make(
        tmp_path,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        **MOVING,
        **common,
    )
    scheduled.train()
    assert logged(scheduled, "ebft/ce_coef") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    plain = make(tmp_path, ce_coef=1.0, **common)
    plain.optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.5)
    plain.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        plain.optimizer, lambda step: 1.0 - 0.25 * step
    )
    plain.train()
    assert not logged(plain, "ebft/ce_coef")
    before, moved = weights_of(policy()), weights_of(scheduled.model)
    assert any(not moved[name].allclose(before[name], atol=1e-3) for name in before)
    assert_same_tensors(moved, weights_of(plain.model), relative=5e-6)


def test_a_weight_that_starts_at_zero_costs_no_pass_there(tmp_path):
    trainer = make(tmp_path, ce_coef=0.0, ce_coef_schedule="linear", ce_coef_final=0.3)
    trainer.train()
    assert logged(trainer, "ebft/ce_coef") == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert len(logged(trainer, "ebft/ce_loss")) == 3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_to_the_same_value_changes_nothing(tmp_path, schedule):
    moves = {"ce_coef_schedule": schedule, "ce_coef_final": 0.1}
    scheduled = make(tmp_path, RecordedEBFT, ce_coef=0.1, **moves)
    scheduled.train()
    constant = make(tmp_path, RecordedEBFT, ce_coef=0.1)
    constant.train()
    assert_same_tensors(weights_of(scheduled.model), weights_of(constant.model), relative=0)


def test_a_resumed_run_goes_on_with_the_schedule(tmp_path):
    settings = MOVING | {"save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path, RecordedEBFT, **settings)
    whole.train()
    again = make(tmp_path, RecordedEBFT, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(again, "ebft/ce_coef") == logged(whole, "ebft/ce_coef")
    assert again.seen == whole.seen[2:]
    expected = weights_of(whole.model)
    for name, weight in weights_of(again.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ce_coef_schedule": "linear"}, "needs a final value: set ce_coef_final"),
        ({"ce_coef_final": 0.1}, "ce_coef_final=0.1 would have no effect"),
        ({"kl_coef_schedule": "linear", "kl_coef_final": 0.1}, "`beta`"),
    ],
)
def test_schedules_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        EBFTGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
