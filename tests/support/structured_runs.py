"""Runs of structured mode that are compared between one process and several."""

from tests.support.distributed_runs import full_weights
from tests.support.tiny_structured import (
    OnlyCrossEntropy,
    RecordedEBFT,
    config,
    policy,
    rows,
    tokenizer,
)

# 9 rows of 2 processes: the groups of 3 begin at other places on each.
OUT_OF_STEP = {
    "per_device_train_batch_size": 9,
    "per_device_eval_batch_size": 9,
    "num_generations": 6,
}


def lora(make):
    return make(r=4, target_modules="all-linear")


def run(folder, trainer_class=RecordedEBFT, peft_config=None, evaluate_first=False, **settings):
    """Two optimizer steps; what the losses were computed from, weights and log."""
    trainer = trainer_class(
        policy(),
        config(folder, **({"per_device_train_batch_size": 4} | settings)),
        train_dataset=rows(12),
        eval_dataset=rows(3),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    before = trainer.evaluate() if evaluate_first else {}
    trainer.train()
    return {
        "before": before,
        "seen": trainer.seen,
        "weights": full_weights(trainer.model),
        "history": trainer.state.log_history,
    }


def evaluated_first(folder, **settings):
    """Weights after two steps: as they are, and after an evaluation."""
    settings = {"per_device_train_batch_size": 4, "ce_coef": 0.1} | settings
    return {
        name: run(folder / name, evaluate_first=name == "measured", **settings)
        for name in ("plain", "measured")
    }


def cross_entropy_run(folder, **settings):
    """Six prompts a step, dealt out to processes and micro-batches in any way."""
    values = {"ce_coef": 0.3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    return run(folder, OnlyCrossEntropy, **(values | settings))
