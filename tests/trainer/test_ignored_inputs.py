"""Columns and options that the loss would ignore: masks count, everything else is refused."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Seq2SeqTrainingArguments, TrainingArguments

from hf_ebft import EBFTTrainer
from hf_ebft.data import EBFTDataCollator
from hf_ebft.rows.documents import LABEL_MASKS
from tests.support.tiny import (
    PrefixRollouts,
    assert_same_tensors,
    config,
    gradients,
    texts,
    tiny_llama,
    weights_of,
)

# ---- Label masks ------------------------------------------------------------------------------


def half_masked(column: str) -> list[dict[str, Any]]:
    """The first tokens of each row are a prompt, which a column says in its own way."""
    rows = texts(26, 19)
    for row, prompt in zip(rows, (9, 5), strict=True):
        ids = row["input_ids"]
        if column == "labels":
            row["labels"] = [-100] * prompt + ids[prompt:]
        else:
            row[column] = [0] * prompt + [1] * (len(ids) - prompt)
    return rows


@pytest.mark.parametrize("column", LABEL_MASKS)
def test_masks_of_trl_count_as_labels(column: str, tmp_path: Path) -> None:
    """In training and in evaluation; they used to be dropped, and prompts were trained on."""

    def trained(column: str) -> tuple[dict[str, Tensor], float]:
        args = config(tmp_path, max_steps=2, ce_coef=0.5)
        rows = half_masked(column)
        trainer = PrefixRollouts(tiny_llama(), args, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()
        trainer.train()
        return weights_of(trainer.model), before["eval_loss"]

    weights, loss = trained(column)
    expected_weights, expected_loss = trained("labels")
    assert loss == expected_loss
    assert_same_tensors(weights, expected_weights, relative=0)


def test_a_mask_narrows_labels_and_prompt_length(tmp_path: Path) -> None:
    """A token is a target where all columns say so."""
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path))
    ids = torch.randint(1, 11, (1, 12))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :3], mask[:, 9:] = -100, 0
    inputs = {"input_ids": ids, "completion_mask": mask}
    for prompt in ({"labels": labels}, {"prompt_length": torch.tensor([3])}):
        documents = trainer.document_reader.read(inputs | prompt)
        assert documents.is_target[0].nonzero()[:, 0].tolist() == list(range(3, 9))
        assert set(documents.completion_start[0].tolist()) == {3}


# ---- Inputs of the model ----------------------------------------------------------------------


def tiny_gpt2() -> GPT2LMHeadModel:
    """It adds an embedding of token_type_ids to every token."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_positions=128,
            n_embd=32,
            n_layer=2,
            n_head=2,
            eos_token_id=0,
            bos_token_id=0,
        )
    )


def typed_rows() -> list[dict[str, Any]]:
    return [row | {"token_type_ids": [1] * len(row["input_ids"])} for row in texts(24, 24)]


@pytest.mark.parametrize("call", ["train", "evaluate", "predict"])
def test_an_input_that_only_evaluation_would_use_is_refused(call: str, tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=1)
    rows = typed_rows()
    trainer = EBFTTrainer(tiny_gpt2(), args, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(ValueError, match=r"has token_type_ids, which the model takes as input"):
        trainer.predict(rows) if call == "predict" else getattr(trainer, call)()


def test_pixel_values_are_refused(tmp_path: Path) -> None:
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path))
    trainer._model_inputs |= {"pixel_values"}  # as in LLaVA's forward
    inputs = {"input_ids": torch.randint(1, 11, (1, 24)), "pixel_values": torch.zeros(1, 3, 4, 4)}
    with pytest.raises(ValueError, match=r"has pixel_values.*Drop these columns"):
        gradients(trainer, inputs)


@pytest.mark.parametrize("size", [None, 1])
def test_flags_without_effect_are_accepted(size: int | None, tmp_path: Path) -> None:
    """A collator's `use_cache=False` was refused; it changes no number."""

    def trained(**flags: Any) -> tuple[dict[str, Tensor], float]:
        args = config(tmp_path, max_steps=2, ce_coef=0.1, rollout_batch_size=size)
        rows = texts(26, 19, 22, 17)

        def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
            return dict(EBFTDataCollator()(examples)) | flags

        trainer = EBFTTrainer(tiny_llama(), args, collate, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        return weights_of(trainer.model), trainer.evaluate()["eval_loss"]

    weights, loss = trained(use_cache=False, inputs_embeds=None)
    expected_weights, expected_loss = trained()
    assert loss == expected_loss
    assert_same_tensors(weights, expected_weights, relative=0)
    with pytest.raises(ValueError, match="The batch has use_cache, which the model takes"):
        trained(use_cache=True)


def test_a_column_that_the_model_does_not_take_is_accepted(tmp_path: Path) -> None:
    """Llama has no token types: remove_unused_columns drops them, and nothing would use them."""
    rows = typed_rows()
    args = config(tmp_path, max_steps=1)
    EBFTTrainer(tiny_llama(), args, train_dataset=rows, eval_dataset=rows).train()


# ---- Options of other trainers ----------------------------------------------------------------


def test_options_of_other_trainers_are_refused(tmp_path: Path) -> None:
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, predict_with_generate=True
    )
    with pytest.raises(ValueError, match=r"Seq2Seq.*sets predict_with_generate=True, which EBFT"):
        EBFTTrainer(tiny_llama(), args)


@pytest.mark.parametrize(
    "changes", [{"packing": True}, {"max_length": 77}, {"completion_only_loss": True}]
)
def test_options_of_sft_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **changes)
    with pytest.raises(ValueError, match=rf"SFTConfig and sets {next(iter(changes))}=.*EBFTConfig"):
        EBFTTrainer(tiny_llama(), args)


def test_untouched_options_of_sft_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SFTTrainer would cut rows by default; here nothing does."""
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        EBFTTrainer(tiny_llama(), args)
    assert "max_length=1024" in caplog.text


@dataclass
class ScriptArguments(TrainingArguments):
    """A script's own settings, which it reads itself."""

    max_length: int = 64
    data_path: str = dataclasses.field(default="")


def test_fields_of_a_script_are_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = ScriptArguments(output_dir=str(tmp_path), use_cpu=True, max_length=3, data_path="x")
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        EBFTTrainer(tiny_llama(), args)
    assert not caplog.records
