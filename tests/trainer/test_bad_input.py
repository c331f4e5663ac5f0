"""Mistakes of users: each gives a helpful error, or has a documented behaviour.

Values of configuration fields are in tests/test_config.py.
"""

import copy
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from hf_ebft import EBFTTrainer, Rollouts
from hf_ebft.data import EBFTDataCollator
from tests.support.tiny import (
    batch_of,
    config,
    gradients,
    logged,
    texts,
    tiny_llama,
    tiny_tokenizer,
)

IDS = torch.arange(24).view(2, 12)


def loss_of(folder: Path, inputs: dict[str, Any], **settings: Any) -> Any:
    trainer = EBFTTrainer(tiny_llama(), config(folder, **settings))
    return trainer.compute_loss(trainer.model, inputs)


# ---- Datasets -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_an_empty_dataset_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is empty"):
        EBFTTrainer(tiny_llama(), config(tmp_path), **{name: []})


def test_an_empty_dataset_of_several_is_named(tmp_path: Path) -> None:
    datasets = {"code": texts(20), "prose": []}
    with pytest.raises(ValueError, match=r"eval_dataset\['prose'\] is empty"):
        EBFTTrainer(tiny_llama(), config(tmp_path), eval_dataset=datasets)


def test_a_stream_needs_no_length(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(texts(20, 20))

    trainer = EBFTTrainer(tiny_llama(), config(tmp_path, max_steps=1), train_dataset=Stream())
    trainer.train()
    assert trainer.state.global_step == 1


def test_rows_without_input_ids_are_named(tmp_path: Path) -> None:
    rows = [{"text": "def f(): pass", "tokens": [1, 2]}] * 2
    args = config(tmp_path, max_steps=1, remove_unused_columns=False)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=rows)
    with pytest.raises(ValueError, match=r"no input_ids, only \['text', 'tokens'\].*tokenize"):
        trainer.train()


def test_a_name_in_place_of_a_model_is_refused(tmp_path: Path) -> None:
    message = r"model='gpt2' is not a loaded model.*from_pretrained\('gpt2'\)"
    with pytest.raises(TypeError, match=message):
        EBFTTrainer("gpt2", config(tmp_path), train_dataset=texts(4, 24))  # type: ignore[arg-type]


def test_a_batch_without_input_ids_is_named(tmp_path: Path) -> None:
    """From a collator of the user's own."""
    with pytest.raises(ValueError, match=r"no input_ids \(it has \['inputs_embeds', 'labels'\]\)"):
        loss_of(tmp_path, {"labels": IDS, "inputs_embeds": torch.randn(2, 12, 16)})


def test_rows_shorter_than_a_block_train_on_cross_entropy_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted in the log, announced once, never silent."""
    args = config(tmp_path, max_steps=3, ce_coef=0.5)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(6, 3, 2, 5))
    before = copy.deepcopy(trainer.model.state_dict())
    with caplog.at_level(logging.WARNING, logger="hf_ebft.training.step_log"):
        trainer.train()
    warnings = [record.getMessage() for record in caplog.records]
    assert len([text for text in warnings if "room for a block" in text]) == 1
    assert "context_length + generate_max_len = 7" in caplog.text
    assert logged(trainer, "ebft/documents_without_blocks") == [1.0, 1.0, 1.0]
    assert logged(trainer, "ebft/rl_loss") == [0.0, 0.0, 0.0]
    assert all(loss > 0 for loss in logged(trainer, "ebft/ce_loss"))
    assert "ebft/cfm_loss" not in trainer.state.log_history[0]
    moved = trainer.model.state_dict()
    assert any(not torch.equal(before[name], moved[name]) for name in before)


def test_some_short_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A row with blocks beside one without: no warning, and the share in the log."""
    args = config(tmp_path, max_steps=1)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(6, 20))
    trainer.train()
    assert logged(trainer, "ebft/documents_without_blocks") == [0.5]
    assert "room for a block" not in caplog.text


def test_a_row_of_a_single_token_is_accepted(tmp_path: Path) -> None:
    loss, gradient = gradients(
        EBFTTrainer(tiny_llama(), config(tmp_path, ce_coef=0.5)), {"input_ids": IDS[:, :1]}
    )
    assert float(loss) == 0.0
    assert not any(tensor.any() for tensor in gradient.values())


@pytest.mark.parametrize("ce_coef", [0.0, 0.5])
def test_all_labels_masked_gives_a_zero_gradient_and_a_warning(
    tmp_path: Path, ce_coef: float, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row | {"labels": [-100] * 20} for row in texts(20, 20)]
    args = config(tmp_path, max_steps=1, ce_coef=ce_coef)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=rows)
    trainer.train()
    assert "unmasked" in caplog.text
    assert logged(trainer, "loss") == [0.0]
    assert logged(trainer, "grad_norm") == [0.0]
    assert logged(trainer, "ebft/documents_without_blocks") == [1.0]


# ---- Columns --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "input_ids", [IDS[0], IDS[None], IDS[:, :0], IDS[:0], IDS.tolist()], ids=str
)
def test_input_ids_of_another_shape_are_refused(tmp_path: Path, input_ids: Any) -> None:
    with pytest.raises(ValueError, match=r"input_ids must be a tensor of shape \(rows, tokens\)"):
        loss_of(tmp_path, {"input_ids": input_ids})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_token_ids_that_are_not_whole_numbers_are_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Rounded silently, they would be other tokens."""
    with pytest.raises(ValueError, match=f"input_ids must hold token ids.*{dtype}"):
        loss_of(tmp_path, {"input_ids": IDS.to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_the_collator_refuses_them_too(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="input_ids"):
        EBFTDataCollator()([{"input_ids": torch.tensor([1.5, 2.5]).to(dtype)}])


@pytest.mark.parametrize("token", [-1, 61, 1000])
def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path, token: int) -> None:
    """On a GPU an embedding would only fail with a device-side assert."""
    ids = IDS.clone()
    ids[1, 3] = token
    with pytest.raises(ValueError, match=rf"input_ids holds \[{token}\].* to 60\."):
        loss_of(tmp_path, {"input_ids": ids})


def test_padding_may_have_any_token_id(tmp_path: Path) -> None:
    """Some collators pad with -100 or with an id beyond the embedding."""
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    padded = IDS.clone()
    padded[1, 9:] = -100
    expected = loss_of(tmp_path, {"input_ids": IDS, "attention_mask": mask})
    actual = loss_of(tmp_path, {"input_ids": padded, "attention_mask": mask})
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "name", ["attention_mask", "labels", "document_ids", "seq_idx", "position_ids"]
)
@pytest.mark.parametrize("shape", [(2, 11), (1, 12), (2, 1, 12, 12)], ids=str)
def test_columns_of_another_shape_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=rf"{name} has shape .*input_ids has shape \(2, 12\)"):
        loss_of(tmp_path, {"input_ids": IDS, name: torch.ones(shape, dtype=torch.long)})


def test_shifted_labels_are_refused(tmp_path: Path) -> None:
    """Some scripts shift labels themselves; every target would be off by one."""
    labels = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)
    with pytest.raises(ValueError, match=r"labels differ from input_ids.*not shifted"):
        loss_of(tmp_path, {"input_ids": IDS, "labels": labels})


@pytest.mark.parametrize("prompt_length", [[-1, 2], [2, 13]])
def test_a_prompt_longer_than_its_row_is_refused(tmp_path: Path, prompt_length: list[int]) -> None:
    with pytest.raises(ValueError, match=r"prompt_length=\[.*\[12, 12\]"):
        loss_of(tmp_path, {"input_ids": IDS, "prompt_length": torch.tensor(prompt_length)})


def test_a_prompt_may_not_reach_into_padding(tmp_path: Path) -> None:
    batch = batch_of(texts(12, 8)) | {"prompt_length": torch.tensor([3, 9])}
    with pytest.raises(ValueError, match=r"prompt_length=\[3, 9\].*\[12, 8\]"):
        loss_of(tmp_path, batch)


def test_prompt_lengths_for_another_number_of_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt_length has 3 entries for 2 rows"):
        loss_of(tmp_path, {"input_ids": IDS, "prompt_length": torch.tensor([1, 2, 3])})


def test_prompt_lengths_of_packed_rows_are_refused(tmp_path: Path) -> None:
    inputs = {
        "input_ids": IDS,
        "prompt_length": torch.tensor([1, 1]),
        "document_ids": (torch.arange(12) // 6).expand(2, 12),
    }
    with pytest.raises(ValueError, match=r"prompt_length.*packs several documents.*labels"):
        loss_of(tmp_path, inputs)


def test_document_masking_without_any_boundary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"document_masking=True.*document_ids.*eos_token"):
        loss_of(tmp_path, {"input_ids": IDS}, document_masking=True)


def test_a_tokenizer_needs_no_pad_token(tmp_path: Path) -> None:
    """Rows padded with an id that is text give the same as rows padded with a pad token."""
    losses = []
    for special_tokens in ({}, {"pad_token": "<pad>"}):
        tokenizer = tiny_tokenizer(**special_tokens)
        assert (tokenizer.pad_token is None) == (not special_tokens)
        trainer = EBFTTrainer(
            tiny_llama(),
            config(tmp_path, max_steps=2, ce_coef=0.1),
            train_dataset=texts(20, 12, 30),
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


# ---- Networks -------------------------------------------------------------------------------


def test_a_feature_network_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embeds 50 token ids, but the policy 61.*tokenizer"):
        EBFTTrainer(tiny_llama(), config(tmp_path), feature_network=tiny_llama(vocabulary=50))


def test_a_feature_network_that_is_the_policy_is_refused(tmp_path: Path) -> None:
    """Freezing it would freeze the policy."""
    policy = tiny_llama()
    with pytest.raises(ValueError, match=r"shares parameters.*copy.deepcopy"):
        EBFTTrainer(policy, config(tmp_path), feature_network=policy)
    assert all(weight.requires_grad for weight in policy.parameters())


def test_a_feature_network_under_the_policys_adapters_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    policy = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="shares parameters"):
        EBFTTrainer(policy, config(tmp_path), feature_network=base)


def test_two_feature_networks_are_refused(tmp_path: Path) -> None:
    args = config(tmp_path, feature_model_name_or_path="some/model")
    with pytest.raises(ValueError, match=r"feature_network.*_name_or_path='some/model'"):
        EBFTTrainer(tiny_llama(), args, feature_network=tiny_llama(seed=1))


def test_an_unknown_placement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="feature_placement='nowhere'"):
        EBFTTrainer(tiny_llama(), config(tmp_path, feature_placement="nowhere"))


def test_a_model_that_is_not_a_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Linear is not a transformers model"):
        EBFTTrainer(nn.Linear(2, 2), config(tmp_path))


def test_adapters_on_adapters_are_refused(tmp_path: Path) -> None:
    adapters = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="a model that has adapters already"):
        EBFTTrainer(get_peft_model(tiny_llama(), adapters), config(tmp_path), peft_config=adapters)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_frozen_model_can_be_evaluated_and_not_trained(adapters: bool, tmp_path: Path) -> None:
    model: Any = tiny_llama()
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    model.requires_grad_(False)
    rows = texts(20, 20)
    trainer = EBFTTrainer(model, config(tmp_path), train_dataset=rows, eval_dataset=rows)
    trainer.evaluate()
    advice = "is_trainable=True" if adapters else "Set requires_grad"
    with pytest.raises(ValueError, match=f"No weight of the model is trainable.*{advice}"):
        trainer.train()


@pytest.mark.parametrize("optim", ["lomo", "adalomo"])
def test_an_optimizer_that_updates_in_the_backward_pass_cannot_split_a_batch(
    optim: str, tmp_path: Path
) -> None:
    args = config(tmp_path, optim=optim, rollout_batch_size=1)
    with pytest.raises(ValueError, match=rf"optim='{optim}' updates .*rollout_batch_size=1 makes"):
        EBFTTrainer(tiny_llama(), args, train_dataset=texts(20))
    EBFTTrainer(tiny_llama(), config(tmp_path, optim=optim), train_dataset=texts(20))


def test_a_run_without_a_full_batch_is_refused(tmp_path: Path) -> None:
    args = config(tmp_path, dataloader_drop_last=True, max_steps=1)
    with pytest.raises(ValueError, match=r"drops all 1 rows.*needs 2 rows"):
        EBFTTrainer(tiny_llama(), args, train_dataset=texts(20)).train()
    EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 20)).train()


def test_adapters_without_a_model_are_refused(tmp_path: Path) -> None:
    adapters = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"peft_config needs a model.*model_init"):
        EBFTTrainer(model_init=tiny_llama, args=config(tmp_path), peft_config=adapters)


def test_documents_longer_than_the_positions_of_a_model_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )
    trainer = EBFTTrainer(model, config(tmp_path))
    with pytest.raises(ValueError, match=r"A document has 17 tokens.*beyond 16"):
        trainer.compute_loss(model, {"input_ids": torch.arange(17)[None]})


# ---- Numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_stop_sampling(tmp_path: Path, value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = value
    trainer = EBFTTrainer(model, config(tmp_path))
    with pytest.raises(FloatingPointError, match=r"logits are not finite.*learning_rate"):
        trainer.compute_loss(model, {"input_ids": IDS})


def test_a_loss_that_is_not_finite_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer's logging_nan_inf_filter would hide it, and the weights would be lost."""
    args = config(tmp_path, max_steps=2, ce_coef=0.5)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 20))
    before = copy.deepcopy(trainer.model.state_dict())
    monkeypatch.setattr(
        "hf_ebft.objective.losses.cross_entropy", lambda log_probs, _: log_probs.sum() * math.nan
    )
    with pytest.raises(FloatingPointError, match=r"loss is nan \(rl_loss=.*ce_loss=nan\)"):
        trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- What would be ignored ------------------------------------------------------------------


def test_another_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compute_loss_func would replace the EBFT loss"):
        EBFTTrainer(tiny_llama(), config(tmp_path), compute_loss_func=lambda *_, **__: 0)


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 .*set it to 0"):
        EBFTTrainer(tiny_llama(), args)


# ---- Subclasses -----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["samples", "blocks", "tokens"])
def test_rollouts_of_a_wrong_shape_are_refused(tmp_path: Path, cut: str) -> None:
    class Wrong(EBFTTrainer):
        def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
            rollouts = super().sample_rollouts(model, inputs)
            index = {
                "samples": (slice(None), slice(1)),
                "blocks": (slice(None), slice(None), slice(1)),
                "tokens": (..., slice(1)),
            }[cut]
            return dataclasses.replace(rollouts, tokens=rollouts.tokens[index])

    trainer = Wrong(tiny_llama(), config(tmp_path))
    with pytest.raises(ValueError, match=r"shape .*needs .*= \(2, 3, 2, 3\)"):
        trainer.compute_loss(trainer.model, {"input_ids": IDS})


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_rollouts_that_are_not_token_ids_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """As a sampler outside of torch may return them."""

    class Wrong(EBFTTrainer):
        def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
            rollouts = super().sample_rollouts(model, inputs)
            return dataclasses.replace(rollouts, tokens=rollouts.tokens.to(dtype))

    trainer = Wrong(tiny_llama(), config(tmp_path))
    with pytest.raises(ValueError, match=rf"tokens .*{dtype}.*torch.int64"):
        trainer.compute_loss(trainer.model, {"input_ids": IDS})


def test_compiled_split_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch_compile=True with packed_attention='split'"):
        EBFTTrainer(tiny_llama(), config(tmp_path, torch_compile=True, packed_attention="split"))
