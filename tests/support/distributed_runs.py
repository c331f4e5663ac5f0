"""The training runs that are compared between one process and several.

Imported by the tests (one process) and by `worker.py` (every process of a launch).
"""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from hf_ebft import EBFTConfig
from hf_ebft.evaluation import CompletionMetrics, exact_match
from hf_ebft.evaluation.callbacks import CompletionMetricsCallback, RolloutWatcher
from tests.support.tiny import VOCABULARY, PrefixRollouts, RecordedRollouts, tiny_llama

# With and without blocks, of different lengths; 8 of them, so 2 processes x 2 fit twice.
LENGTHS = (40, 9, 33, 27, 18, 40, 5, 25)


def documents(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()}
        for length in lengths
    ]


def small_llama(**settings):
    """Four layers, so that features come from inside the network."""
    defaults = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.02,
    }
    return tiny_llama(**(defaults | settings))


class RecordedPrefixRollouts(PrefixRollouts, RecordedRollouts):
    """Records what it samples, then trains on rollouts that depend on the prefix alone, so that
    runs with another number of processes can be compared."""


def make_trainer(
    folder: Path,
    *,
    peft=False,
    trainer_class=RecordedPrefixRollouts,
    data=None,
    evaluation=None,
    pretrained=None,
    **settings,
):
    values = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "adam_beta2": 0.999,
        # Adam would make a whole step out of a gradient that is all but rounding.
        "adam_epsilon": 1e-3,
        "ce_coef": 0.1,
        "stride": 4,
        "context_length": 4,
        "generate_max_len": 3,
        "n_samples_per_prompt": 3,
        "seed": 3,
    }
    torch.manual_seed(0)  # of the adapters
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True) if peft else None
    return trainer_class(
        small_llama() if pretrained is None else LlamaForCausalLM.from_pretrained(pretrained),
        EBFTConfig(**(values | settings)),
        train_dataset=documents() if data is None else data,
        eval_dataset=evaluation,
        peft_config=lora,
    )


def full_weights(model):
    """Every parameter, whole, by name; a collective call under FSDP2."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }


def summary(trainer):
    """What a run left behind, for comparison."""
    return {
        "weights": full_weights(trainer.model),
        "sharded": any(isinstance(p.data, DTensor) for p in trainer.model.parameters()),
        "history": trainer.state.log_history,
        "sampled": trainer.sampled,
    }


def trained(folder, **settings):
    trainer = make_trainer(folder, **settings)
    trainer.train()
    return summary(trainer)


def evaluated_first(folder, **settings):
    """Runs of two steps: one as it is, one after an evaluation and a prediction."""
    settings = {"evaluation": documents((21, 30, 17), seed=1), "max_steps": 2} | settings
    plain = make_trainer(folder, **settings)
    plain.train()
    measured = make_trainer(folder, **settings)
    before = measured.evaluate()
    measured.predict(documents((25, 14), seed=2))
    measured.train()
    measured.evaluate()
    wrapper = type(measured.model_wrapped).__name__
    return {
        "plain": summary(plain),
        "measured": summary(measured),
        "before": before,
        "wrapper": wrapper,
    }


def resumed(folder, **settings):
    """Final weights of an uninterrupted run of 4 steps, and of one resumed after 2."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "trainer_class": RecordedRollouts,
    } | settings
    whole = make_trainer(folder, **settings)
    whole.train()
    again = make_trainer(folder, **settings)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {"whole": summary(whole), "resumed": summary(again)}


def averaged(folder, **settings):
    """Weights and their averages after a run of 4 steps, and after one resumed after 2."""
    settings = {
        "ema_decay": 0.7,
        "evaluation": documents((21, 30), seed=1),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    } | settings
    whole = make_trainer(folder, **settings)
    whole.train()
    again = make_trainer(folder, **settings)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {
        name: summary(trainer) | {"averages": full_averages(trainer)}
        for name, trainer in {"whole": whole, "resumed": again}.items()
    }


def scheduled(folder, **settings):
    """A run whose cross-entropy begins after, and whose KL penalty ends before, the last step."""
    settings = {
        "ce_coef": 0.0,
        "ce_coef_schedule": "linear",
        "ce_coef_final": 0.6,
        "kl_coef": 0.3,
        "kl_coef_schedule": "cosine",
        "kl_coef_final": 0.0,
    } | settings
    return trained(folder, **settings)


# Advantages by token; whitened features are not what its regressions predict.
FITTED = {"advantage_estimator": "fitted", "use_whitening": False}


def fitted(folder, **settings):
    """A run whose baselines are fitted between its steps."""
    return trained(folder, **FITTED, **settings)


def full_averages(trainer):
    """The averaged weights, whole, by name."""
    with trainer.averaging.applied():
        return full_weights(trainer.model)


def whitened_by_corpus(folder, **settings):
    """A run that whitens by the second moment of all training documents."""
    return trained(folder, whitening_space="corpus", max_steps=2, **settings)


def watched(folder, tokenizer, **settings):
    """What two looks during a run of 2 steps see: rollouts of prefixes, completions of prompts."""
    trainer = make_trainer(
        folder,
        max_steps=2,
        evaluation=documents((21, 30), seed=1),
        eval_strategy="steps",
        eval_steps=2,
        **settings,
    )
    trainer.processing_class = tokenizer
    watcher = RolloutWatcher(trainer, documents((20, 31), seed=5), every_steps=1)
    prompts = ["\x01\x02\x03", "\x05", "\x07\x04"]
    scores = CompletionMetrics({"exact": exact_match})
    generation = {"max_new_tokens": 4, "batch_size": 1}
    generator = CompletionMetricsCallback(trainer, scores, prompts, prompts, **generation)
    trainer.add_callback(watcher)
    trainer.add_callback(generator)
    trainer.train()
    groups = [group.to_dict() for group in watcher.latest]
    return summary(trainer) | {"groups": groups, "completions": generator.completions}


class CharacterTokenizer:
    """Token ids are the characters' numbers."""

    pad_token_id = 0
    eos_token_id = None

    def __call__(self, text):
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids):
        return "".join(chr(int(i)) for i in ids)

    def batch_decode(self, rows, skip_special_tokens):
        return [self.decode(row) for row in rows]


def assert_same_weights(left, right, tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name],
            right[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_same_metrics(history, reference_history):
    """Training logs agree in everything but clocks."""
    pairs = zip(training_logs(history), training_logs(reference_history), strict=True)
    for ours, reference in pairs:
        assert ours.keys() == reference.keys()
        for key, value in reference.items():
            assert ours[key] == pytest.approx(value, rel=2e-3, abs=2e-5), key


def training_logs(history):
    """The entries that a training log made, without clocks."""
    return [
        {
            key: value
            for key, value in entry.items()
            if "seconds" not in key and "runtime" not in key
        }
        for entry in history
        if "loss" in entry
    ]


def assert_evaluation_left_no_trace(ranks, sharded):
    """Weights after `evaluate()`, `predict()` and `train()` are those after `train()` alone.

    Born from an upstream fault: preparing the model for evaluation kept `train()` from wrapping it,
    so each process trained on its own gradients; FSDP2 crashed.
    """
    for run in ("evaluated_first", "evaluated_first_adapters"):
        first, second = (rank[run] for rank in ranks)
        assert_same_weights(first["measured"]["weights"], second["measured"]["weights"], 0.0)
        assert_same_weights(first["measured"]["weights"], first["plain"]["weights"], 0.0)
        assert first["measured"]["sharded"] == sharded
        assert "eval_ebft/cfm_loss" in first["before"]
        assert sharded or first["wrapper"] == "DistributedDataParallel"
