"""Equivalent runs must train the same: accumulation, packing, resume, evaluation.

No test here knows the right numbers; each compares two runs that have to agree.
"""

import copy
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ebft import EBFTConfig, EBFTTrainer, Rollouts
from hf_ebft.data import EBFTDataCollator
from tests.support.tiny import (
    PrefixRollouts,
    RecordedRollouts,
    assert_same_tensors,
    batch_of,
    config,
    gradient_of,
    gradients,
    logged,
    texts,
    tiny_llama,
    weights_of,
)

# Rounding of a gradient in float32, relative to its largest entry.
ROUNDING = 2e-5
# Its name in this release of transformers.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
WALL_CLOCK = ("ebft/seconds_rollout", "ebft/seconds_features", "ebft/seconds_training")


def metrics_logged(trainer: EBFTTrainer) -> list[dict[str, float]]:
    """Every training log without what depends on the clock."""
    return [
        {name: value for name, value in entry.items() if name not in WALL_CLOCK}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


class RecordGradients(TrainerCallback):
    """Keeps the gradient of each optimizer step, as the optimizer is about to see it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Copy them."""
        self.steps.append(gradient_of(model))


# ---- Batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"ce_coef": 0.3, "kl_coef": 0.2}], ids=["rl", "rl+ce+kl"])
def test_accumulation_gives_the_gradient_of_one_batch(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """One document short, one long: each must weigh a quarter however the four are split, evenly
    or into three and one (where a mean of means would weigh the last document three times)."""
    runs = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2), (3, 2)):
        gradient = RecordGradients()
        args = config(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            **settings,
        )
        rows = texts(9, 30, 17, 24)
        trainer = PrefixRollouts(tiny_llama(), args, train_dataset=rows, callbacks=[gradient])
        trainer.train()
        runs.append((gradient.steps[0], metrics_logged(trainer)[0]))
    (whole, whole_log), *splits = runs
    for split, split_log in splits:
        assert_same_tensors(split, whole, relative=ROUNDING)
        assert split_log.keys() == whole_log.keys()
        for name, value in whole_log.items():
            assert split_log[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "change",
    [
        {"rollout_batch_size": 1},
        {"rollout_batch_size": 3},
        {"rollout_batch_size": 100},
        {"pad_to_multiple_of": 16},
        {"pad_to_multiple_of": 50},
        {"log_prob_chunk_size": 7},
        {"packed_attention": "sdpa"},
        {"packed_attention": "eager"},
        {"rollout_batch_size": 1, "gradient_accumulation_steps": 2, "batch": 2},
    ],
    ids=str,
)
def test_chunking_a_batch_changes_neither_gradient_nor_metrics(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """Parts, padding, chunks and attention: only time and memory may differ."""
    runs = []
    for settings in ({}, change):
        gradient = RecordGradients()
        args = config(
            tmp_path,
            per_device_train_batch_size=settings.get("batch", 4),
            max_steps=1,
            ce_coef=0.3,
            kl_coef=0.2,
            **{name: value for name, value in settings.items() if name != "batch"},
        )
        rows = texts(9, 30, 17, 24)
        trainer = PrefixRollouts(tiny_llama(), args, train_dataset=rows, callbacks=[gradient])
        trainer.train()
        runs.append((gradient.steps[0], metrics_logged(trainer)[0]))
    (whole, whole_log), (changed, changed_log) = runs
    assert_same_tensors(changed, whole, relative=ROUNDING)
    for name, value in whole_log.items():
        assert changed_log[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_step_by_hand_in_parts_is_the_mean_over_its_batch(tmp_path: Path) -> None:
    """Without a count of the step's documents, the batch is the step."""
    losses = []
    for size in (None, 2):
        trainer = PrefixRollouts(tiny_llama(), config(tmp_path, rollout_batch_size=size))
        trainer.current_gradient_accumulation_steps = 1  # as Trainer.train sets it
        losses.append(trainer.training_step(trainer.model, batch_of(texts(9, 30, 17))))
        losses.append(next(trainer.model.parameters()).grad)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[3], losses[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [torch.ones(3), torch.tensor(1.0), 1.0])
def test_columns_that_cannot_be_split_are_refused(weights: Any, tmp_path: Path) -> None:
    trainer = PrefixRollouts(tiny_llama(), config(tmp_path, rollout_batch_size=1))
    batch = batch_of(texts(9, 30)) | {"weights": weights}
    with pytest.raises(ValueError, match=r"rollout_batch_size=1 .* 2 rows.* weights"):
        trainer.training_step(trainer.model, batch)


@pytest.mark.parametrize("boundaries", ["document_ids", "seq_idx", "position_ids", "eos"])
@pytest.mark.parametrize("sliding_window", [None, 5])
def test_packed_documents_train_like_rows_of_their_own(
    tmp_path: Path, boundaries: str, sliding_window: int | None
) -> None:
    """Two documents in one row see nothing of each other and weigh as much as two rows."""
    eos = 60
    short, long = ([*row["input_ids"][:-1], eos] for row in texts(14, 23, vocabulary=eos))
    packed: dict[str, list[int]] = {"input_ids": short + long}
    if boundaries == "position_ids":
        packed["position_ids"] = [*range(len(short)), *range(len(long))]
    elif boundaries != "eos":
        packed[boundaries] = [1] * len(short) + [2] * len(long)
    args = config(tmp_path, ce_coef=0.3, document_masking=True if boundaries == "eos" else None)
    model: nn.Module = tiny_llama(eos_token_id=eos)
    if sliding_window is not None:
        from transformers import MistralConfig, MistralForCausalLM

        settings = model.config.to_dict() | {"sliding_window": sliding_window}
        settings.pop("model_type")
        settings.pop("architectures", None)
        settings.pop("head_dim", None)
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**settings))
    trainer = PrefixRollouts(model, args)
    expected_loss, expected = gradients(
        trainer, batch_of([{"input_ids": short}, {"input_ids": long}])
    )
    loss, actual = gradients(trainer, batch_of([packed]))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert_same_tensors(actual, expected, relative=ROUNDING)


@pytest.mark.parametrize("labels", [False, True])
def test_padding_on_either_side_changes_nothing(tmp_path: Path, labels: bool) -> None:
    """The same documents alone, right-padded and left-padded, with a pad id that is text."""
    rows: list[dict[str, Any]] = texts(11, 26)
    if labels:
        for row in rows:
            row["labels"] = [-100] * 3 + row["input_ids"][3:]
    trainer = PrefixRollouts(tiny_llama(), config(tmp_path, ce_coef=0.3, kl_coef=0.1))
    alone = [gradients(trainer, batch_of([row])) for row in rows]
    expected = {name: (alone[0][1][name] + alone[1][1][name]) / 2 for name in alone[0][1]}
    for side in ("right", "left"):
        loss, actual = gradients(trainer, batch_of(rows, side=side, pad=rows[0]["input_ids"][0]))
        torch.testing.assert_close(loss, (alone[0][0] + alone[1][0]) / 2, rtol=1e-5, atol=1e-6)
        assert_same_tensors(actual, expected, relative=ROUNDING)


def test_prompt_length_means_the_same_as_masked_labels(tmp_path: Path) -> None:
    """Two ways of marking a completion, the same blocks, loss and gradient."""
    trainer = PrefixRollouts(tiny_llama(), config(tmp_path, ce_coef=0.3, min_completion_prefix=2))
    rows = texts(21, 30)
    prompts = (7, 3)
    by_labels = [
        row | {"labels": [-100] * prompt + row["input_ids"][prompt:]}
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    batch = batch_of(rows)
    expected_loss, expected = gradients(trainer, batch_of(by_labels))
    loss, actual = gradients(trainer, batch | {"prompt_length": torch.tensor(prompts)})
    assert torch.equal(loss, expected_loss)
    assert_same_tensors(actual, expected, relative=0)


# ---- Randomness -----------------------------------------------------------------------------


def sampled_in_two_steps(folder: Path, **settings: Any) -> list[Tensor]:
    args = config(folder, max_steps=2, learning_rate=1e-6, **settings)
    trainer = RecordedRollouts(tiny_llama(), args, train_dataset=texts(16, 16))
    trainer.train()
    return trainer.sampled


def test_rollouts_depend_on_seed_step_and_micro_batch(tmp_path: Path) -> None:
    first = sampled_in_two_steps(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(first, sampled_in_two_steps(tmp_path), strict=True)
    )
    assert not torch.equal(first[0], first[1])

    # data_seed keeps the order of the rows, so that only the rollouts can differ.
    other_seed = sampled_in_two_steps(tmp_path, seed=7, data_seed=42)
    assert not torch.equal(first[0], other_seed[0])

    row = texts(16)[0]
    args = config(
        tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    trainer = RecordedRollouts(tiny_llama(), args, train_dataset=[row, row])
    trainer.train()
    assert not torch.equal(trainer.sampled[0], trainer.sampled[1])


def test_every_process_draws_its_own_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sampled_in_two_steps(tmp_path)
    # Set by the environment of a real distributed run.
    monkeypatch.setattr(EBFTConfig, "process_index", 1)
    second = sampled_in_two_steps(tmp_path)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sampling_does_not_change_the_global_generators(tmp_path: Path) -> None:
    """Data order and dropout of a run must not depend on how many tokens were sampled."""
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path))
    state = torch.get_rng_state()
    trainer.sample_rollouts(trainer.model, batch_of(texts(20)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("verify_packing", [False, True])
def test_the_constructor_leaves_the_global_generators_where_trainer_does(
    tmp_path: Path, verify_packing: bool
) -> None:
    """Self-tests and copies must not shift the data order of a run."""
    Trainer(tiny_llama(), config(tmp_path))
    expected = torch.get_rng_state()
    EBFTTrainer(tiny_llama(), config(tmp_path, verify_packing=verify_packing))
    assert torch.equal(torch.get_rng_state(), expected)


def test_training_twice_on_one_trainer_repeats_the_run(tmp_path: Path) -> None:
    """A second train() starts from step 0, with the rollouts and metrics of a first one."""
    args = config(tmp_path, max_steps=1, logging_steps=1)
    trainer = RecordedRollouts(tiny_llama(), args, train_dataset=texts(20, 18))
    start = copy.deepcopy(trainer.model.state_dict())
    # A loss computed by hand in between is no part of either run.
    trainer.compute_loss(trainer.model, batch_of(texts(30)))
    trainer.train()
    trainer.model.load_state_dict(start)
    trainer.optimizer = None
    first = metrics_logged(trainer)
    trainer.train()
    assert torch.equal(trainer.sampled[1], trainer.sampled[2])
    assert metrics_logged(trainer) == first


# ---- Resume and evaluation ------------------------------------------------------------------


def dropout_llama(**settings: Any) -> nn.Module:
    return tiny_llama(attention_dropout=0.2, **settings)


def lora_dropout_llama() -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(1)
    adapters = LoraConfig(
        target_modules=["q_proj", "v_proj"], lora_dropout=0.3, init_lora_weights=False
    )
    return get_peft_model(tiny_llama(), adapters)


def run_of_four_steps(
    folder: Path, make_model: Callable[[], nn.Module], resume: str | None = None, **settings: Any
) -> EBFTTrainer:
    args = config(
        folder,
        **{
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
            "gradient_accumulation_steps": 2,
            "ce_coef": 0.1,
        }
        | settings,
    )
    rows = texts(18, 25, 12, 30, 21, 16, 9)
    trainer = EBFTTrainer(make_model(), args, train_dataset=rows, eval_dataset=texts(15, 22, 19))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("make_model", [tiny_llama, dropout_llama, lora_dropout_llama])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, make_model: Callable[[], nn.Module]
) -> None:
    """To the bit, weights and metrics, dropout and accumulation included."""
    whole = run_of_four_steps(tmp_path / "whole", make_model)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = run_of_four_steps(tmp_path / "resumed", make_model, resume=str(checkpoint))
    assert_same_tensors(weights_of(resumed.model), weights_of(whole.model), relative=0)
    assert metrics_logged(resumed) == metrics_logged(whole)
    assert len(logged(whole, "ebft/mean_reward")) == 4


@pytest.mark.parametrize("make_model", [tiny_llama, dropout_llama])
def test_evaluation_leaves_training_untouched(
    tmp_path: Path, make_model: Callable[[], nn.Module]
) -> None:
    """Weights and training metrics to the bit, whether and how often the run is evaluated."""
    without = run_of_four_steps(tmp_path / "without", make_model, save_strategy="no")
    with_evaluation = run_of_four_steps(
        tmp_path / "with",
        make_model,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    assert len(logged(with_evaluation, "eval_ebft/cfm_loss")) == 5
    assert_same_tensors(weights_of(with_evaluation.model), weights_of(without.model), relative=0)
    assert metrics_logged(with_evaluation) == metrics_logged(without)


def test_evaluation_has_a_seed_of_its_own(tmp_path: Path) -> None:
    """The same weights give the same figures, whatever was trained or evaluated before."""
    args = config(tmp_path, max_steps=2, learning_rate=0.0)
    trainer = EBFTTrainer(
        tiny_llama(), args, train_dataset=texts(20, 14), eval_dataset=texts(17, 22, 25, seed=1)
    )

    def figures() -> dict[str, float]:
        metrics = trainer.evaluate()
        return {name: value for name, value in metrics.items() if "ebft" in name or "loss" in name}

    before = figures()
    assert {"eval_loss", "eval_ebft/cfm_loss", "eval_ebft/alignment"} <= before.keys()
    assert figures() == before
    trainer.train()
    assert figures() == before


# ---- Modes of the model ---------------------------------------------------------------------


def test_sampling_has_no_dropout_and_restores_modes(tmp_path: Path) -> None:
    """Dropout of 90 % would change most tokens; a module kept in eval mode stays there."""
    plain, dropping = tiny_llama(), tiny_llama(attention_dropout=0.9)
    batch = batch_of(texts(30, 24))
    expected = EBFTTrainer(plain, config(tmp_path)).sample_rollouts(plain, batch).tokens
    dropping.train()
    frozen = dropping.model.layers[0].eval()
    modes = {name: module.training for name, module in dropping.named_modules()}
    trainer = EBFTTrainer(dropping, config(tmp_path))
    assert torch.equal(trainer.sample_rollouts(dropping, batch).tokens, expected)
    assert {name: module.training for name, module in dropping.named_modules()} == modes
    assert not frozen.training
    assert dropping.training


def test_the_training_pass_has_dropout(tmp_path: Path) -> None:
    """Regularisation that the user asked for must reach the gradient."""
    trainer = PrefixRollouts(dropout_llama(), config(tmp_path))
    batch = batch_of(texts(30, 24))
    trainer.model.train()
    _, first = gradients(trainer, batch)
    _, second = gradients(trainer, batch)
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.weight"], second["model.layers.0.mlp.up_proj.weight"]
    )


def test_tied_embeddings_get_the_sum_of_both_gradients(tmp_path: Path) -> None:
    """The gradient of a tied weight is the sum of those of the embedding and of the head."""
    tied = tiny_llama(tie_word_embeddings=True)
    untied = tiny_llama(tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.model.embed_tokens.weight})
    args = config(tmp_path, ce_coef=0.2)
    batch = batch_of(texts(22, 30))
    loss, of_tied = gradients(PrefixRollouts(tied, args), batch)
    untied_loss, of_untied = gradients(PrefixRollouts(untied, args), batch)
    torch.testing.assert_close(loss, untied_loss)
    expected = of_untied.pop("lm_head.weight") + of_untied["model.embed_tokens.weight"]
    of_untied["model.embed_tokens.weight"] = expected
    assert_same_tensors(of_tied, of_untied, relative=ROUNDING)


@pytest.mark.parametrize("placement", ["same_device", "shared"])
def test_training_adapters_does_not_change_the_features(tmp_path: Path, placement: str) -> None:
    """phi is the policy before training, as a copy or as the base under the adapters."""
    args = config(tmp_path, max_steps=3, learning_rate=0.5, feature_placement=placement)
    trainer = PrefixRollouts(
        tiny_llama(),
        args,
        train_dataset=texts(22, 30, 18, 25),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    assert trainer.feature_network.shared == (placement == "shared")
    batch = batch_of(texts(22, 30))

    def features() -> Tensor:
        rollouts = trainer.sample_rollouts(trainer.model, batch)
        return trainer.feature_network.embed(rollouts).generated

    before, weights = features(), weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    trained = [name for name in weights if not torch.equal(weights[name], after[name])]
    assert trained
    assert all("lora_" in name for name in trained)
    torch.testing.assert_close(features(), before, rtol=0, atol=1e-6)
    # The policy itself has moved, and its adapters are on again.
    with trainer.model.disable_adapter():
        base = trainer.model(**batch).logits
    assert not torch.allclose(trainer.model(**batch).logits, base, atol=1e-2)


def test_training_does_not_change_the_feature_network(tmp_path: Path) -> None:
    """A copy shares no storage with the policy."""
    args = config(tmp_path, max_steps=2, learning_rate=0.5)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(22, 30))
    before = weights_of(trainer.feature_network.model)
    start = weights_of(trainer.model)
    trainer.train()
    assert_same_tensors(weights_of(trainer.feature_network.model), before, relative=0)
    assert not any(weight.requires_grad for weight in trainer.feature_network.model.parameters())
    assert not trainer.feature_network.model.training
    moved = weights_of(trainer.model)
    assert all(not torch.equal(moved[name], start[name]) for name in start)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_gradient_checkpointing_changes_no_bit(
    tmp_path: Path, use_reentrant: bool, peft: bool
) -> None:
    """Memory is all that it may cost or save, with frozen bases too."""
    runs = []
    for checkpointing in (False, True):
        gradient = RecordGradients()
        args = config(
            tmp_path,
            max_steps=2,
            ce_coef=0.1,
            **{CHECKPOINTING: checkpointing},
            **{f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}},
        )
        torch.manual_seed(2)
        adapters = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = EBFTTrainer(
            tiny_llama(),
            args,
            train_dataset=texts(22, 30),
            callbacks=[gradient],
            peft_config=adapters if peft else None,
        )
        trainer.train()
        assert all(any(tensor.any() for tensor in step.values()) for step in gradient.steps)
        runs.append((gradient.steps, metrics_logged(trainer)))
    assert len(runs[0][0]) == 2
    for plain, checkpointed in zip(runs[0][0], runs[1][0], strict=True):
        assert_same_tensors(checkpointed, plain, relative=0)
    assert runs[0][1] == runs[1][1]


# ---- What is logged -------------------------------------------------------------------------


class KeepOutputs(EBFTTrainer):
    """Keeps what every micro-batch's loss was made of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept: list[tuple[float, Any]] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """Compute it with its parts."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        self.kept.append((loss.item(), outputs))
        return loss


def test_logged_metrics_are_means_over_accumulation_and_steps(tmp_path: Path) -> None:
    """Against means written out by hand over everything between two logs."""
    args = config(
        tmp_path,
        max_steps=4,
        logging_steps=2,
        gradient_accumulation_steps=2,
        rl_coef=0.7,
        ce_coef=0.3,
        kl_coef=0.2,
        alignment_coef=0.9,
        diversity_coef=0.4,
    )
    lengths = (10, 24, 17, 31, 12, 28, 20, 5)
    trainer = KeepOutputs(tiny_llama(), args, train_dataset=texts(*lengths))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    assert len(trainer.kept) == 8
    for entry, kept in zip(entries, (trainer.kept[:4], trainer.kept[4:]), strict=True):
        outputs = [output for _, output in kept]

        def over_rollouts(values: list[Tensor], outputs: list[Any] = outputs) -> Tensor:
            """Values of the rollouts whose blocks exist, end to end."""
            return torch.cat(
                [
                    value.transpose(1, 2)[output.rollouts.exists].flatten()
                    for value, output in zip(values, outputs, strict=True)
                ]
            )

        exists = torch.cat([output.rollouts.exists.flatten() for output in outputs])
        advantages = over_rollouts([output.advantages for output in outputs])
        cfm = torch.cat([output.rewards.cfm_loss.flatten() for output in outputs])[exists]
        surprise = over_rollouts([-output.log_probs.detach().mean(dim=-1) for output in outputs])
        expected = {
            "ebft/alignment": over_rollouts([o.rewards.alignment for o in outputs]).mean(),
            "ebft/diversity": over_rollouts([o.rewards.diversity for o in outputs]).mean(),
            "ebft/mean_reward": over_rollouts([o.rewards.reward for o in outputs]).mean(),
            "ebft/cfm_loss": cfm.mean(),
            "ebft/advantages_std": advantages.std(unbiased=False),
            "ebft/entropy": surprise.mean(),
            # Micro-batches of two documents each.
            "ebft/rl_loss": sum(o.rl_loss.item() for o in outputs) / 4,
            "ebft/ce_loss": sum(o.ce_loss.item() for o in outputs) / 4,
            "ebft/kl": sum(o.kl.item() for o in outputs) / 4,
            "ebft/blocks_per_document": int(exists.sum()) / 8,
            "ebft/documents_without_blocks": sum(
                int((~o.rollouts.exists.any(dim=1)).sum()) for o in outputs
            )
            / 8,
            "loss": sum(loss for loss, _ in kept) / 4,
        }
        for name, value in expected.items():
            assert entry[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
        assert entry["ebft/mean_reward"] == pytest.approx(
            0.9 * entry["ebft/alignment"] - 0.4 * entry["ebft/diversity"], abs=1e-5
        )
        assert entry["loss"] == pytest.approx(
            0.7 * entry["ebft/rl_loss"] + 0.3 * entry["ebft/ce_loss"] + 0.2 * entry["ebft/kl"],
            abs=1e-5,
        )


def test_duplicates_and_groups_without_advantage_are_counted(tmp_path: Path) -> None:
    """Of four equal rollouts three repeat another, and no advantage is left."""

    class Equal(EBFTTrainer):
        def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
            rollouts = super().sample_rollouts(model, inputs)
            tokens = rollouts.tokens[:, :1].expand_as(rollouts.tokens).clone()
            return rollouts.with_tokens(tokens)

    args = config(tmp_path, max_steps=1, n_samples_per_prompt=4)
    trainer = Equal(tiny_llama(), args, train_dataset=texts(20, 26))
    trainer.train()
    assert logged(trainer, "ebft/duplicate_rollouts") == [0.75]
    assert logged(trainer, "ebft/zero_advantage_groups") == [1.0]
    assert logged(trainer, "grad_norm")[0] == pytest.approx(0, abs=1e-5)


def test_collator_pads_on_the_right_and_marks_padding() -> None:
    """The default collator, which the runs above rely on."""
    rows = texts(4, 2)
    batch = EBFTDataCollator()(rows)
    assert batch["input_ids"].tolist() == [rows[0]["input_ids"], [*rows[1]["input_ids"], 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    "settings",
    [
        {"training_chunk_size": 16},
        {"training_chunk_size": 100_000, "kl_coef": 0.1, "ce_coef": 0.1},
        {"packed_attention": "sdpa"},
        {"packed_attention": "eager"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_step_frees_its_tensors_at_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    """None is left in a cycle of references, where it would wait for Python's collector."""
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path, **settings))
    trainer.current_gradient_accumulation_steps = 1  # as when a run starts
    batch = batch_of(texts(40, 33))
    trainer.training_step(trainer.model, dict(batch))
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        trainer.training_step(trainer.model, dict(batch))
        gc.collect()
        left = [thing for thing in gc.garbage if isinstance(thing, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left, [(type(tensor).__name__, tuple(tensor.shape)) for tensor in left]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_compiled_policy_trains_the_same(tmp_path: Path) -> None:
    """Two steps of different lengths: minutes, nearly all of it compilation."""
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        # Equal shapes draw equal rollouts; a compiled run would round them up by itself.
        shapes = {"pad_to_multiple_of": 48}
        args = config(tmp_path, torch_compile=compiled, max_steps=2, ce_coef=0.1, **shapes)
        trainer = EBFTTrainer(
            tiny_llama(num_hidden_layers=1), args, train_dataset=texts(40, 33, 27, 21)
        )
        trainer.train()
        weights.append(weights_of(trainer.model))
    torch._dynamo.reset()
    assert_same_tensors(weights[1], weights[0], relative=1e-4)
