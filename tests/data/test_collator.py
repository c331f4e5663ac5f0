"""Padding: whatever a row's columns are, no padding may later be mistaken for text."""

from typing import Any

import numpy as np
import pytest
import torch

from hf_ebft.data import EBFTDataCollator
from hf_ebft.rows.documents import Documents
from tests.support.tiny import batch_of, texts, tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {
        "input_ids": [5, 6, 7],
        "labels": [-100, 6, 7],
        "position_ids": [0, 1, 0],
        "document_ids": [3, 3, 4],
    },
    {"input_ids": [8], "labels": [8], "position_ids": [0], "document_ids": [9]},
]


def test_every_column_is_padded_on_the_right() -> None:
    batch = EBFTDataCollator(tiny_tokenizer(pad_token="<pad>"))(ROWS)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "position_ids": [[0, 1, 0], [0, 0, 0]],
        "document_ids": [[3, 3, 4], [9, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert all(values.dtype == torch.long for values in batch.values())


def test_ids_are_filled_with_the_tokenizer_s_pad_token() -> None:
    tokenizer = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")
    assert tokenizer.pad_token_id != 0
    batch = EBFTDataCollator(tokenizer)([{"input_ids": [4, 4]}, {"input_ids": [4]}])
    assert batch["input_ids"].tolist() == [[4, 4], [4, tokenizer.pad_token_id]]


@pytest.mark.parametrize("processing_class", [None, tiny_tokenizer()])
def test_no_pad_token_is_needed(processing_class: Any) -> None:
    """The mask says what is padding, so the id under it does not matter."""
    rows = texts(7, 3, 5)
    documents = Documents.from_inputs(EBFTDataCollator(processing_class)(rows))
    for row, document in zip(rows, documents.input_ids.tolist(), strict=True):
        assert document[: len(row["input_ids"])] == row["input_ids"]
    assert documents.is_target.sum(dim=1).tolist() == [7, 3, 5]


def test_a_mask_of_the_row_s_own_is_kept() -> None:
    rows = [{"input_ids": [0, 0, 5], "attention_mask": [0, 0, 1]}, {"input_ids": [6, 7]}]
    batch = EBFTDataCollator()(rows)
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 0]]


def test_prompt_length_is_one_number_a_row() -> None:
    rows = [{"input_ids": [5, 6, 7], "prompt_length": 2}, {"input_ids": [8], "prompt_length": 0}]
    assert EBFTDataCollator()(rows)["prompt_length"].tolist() == [2, 0]


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, tuple])
def test_lists_arrays_and_tensors_give_the_same_batch(convert: Any) -> None:
    rows = texts(4, 6)
    converted = [{"input_ids": convert(row["input_ids"])} for row in rows]
    expected = batch_of(rows)
    batch = EBFTDataCollator()(converted)
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(batch[name], values)


def test_a_row_without_input_ids_is_named() -> None:
    with pytest.raises(ValueError, match=r"no input_ids, only \['text'\]: tokenize"):
        EBFTDataCollator()([{"input_ids": [1]}, {"text": "abc"}])
    with pytest.raises(ValueError, match=r"no input_ids, nor any other column of the model: tok"):
        EBFTDataCollator()([{}])


def test_a_column_of_another_length_is_named() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2]}]
    with pytest.raises(ValueError, match=r"'labels' of a row has shape \(2,\).* 3 input_ids"):
        EBFTDataCollator()(rows)


@pytest.mark.parametrize(("name", "value"), [("labels", [1, 2]), ("prompt_length", 1)])
def test_a_column_that_only_some_rows_have_is_named(name: str, value: Any) -> None:
    """There is no telling what a missing label means: everything a target, or nothing?"""
    with pytest.raises(ValueError, match=f"'{name}'"):
        EBFTDataCollator()([{"input_ids": [1, 2], name: value}, {"input_ids": [3]}])
