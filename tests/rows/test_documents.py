"""Reading a Trainer's batch: padding, boundaries, labels and prompts.

What a malformed batch raises is in tests/test_bad_input.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ebft.rows.documents import Documents
from tests.support.tiny import batch_of

EOS = 9


def read(**inputs: Any) -> Documents:
    return Documents.from_inputs(
        {
            name: value if isinstance(value, Tensor) else torch.tensor(value)
            for name, value in inputs.items()
        }
    )


def test_without_a_mask_every_token_counts() -> None:
    documents = read(input_ids=[[1, 2, 0], [0, 0, 4]])
    assert documents.input_ids.tolist() == [[1, 2, 0], [0, 0, 4]]
    assert documents.document.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert documents.position.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert documents.length.tolist() == [[3, 3, 3], [3, 3, 3]]
    assert documents.is_target.all()
    assert documents.completion_start.tolist() == [[-1] * 3] * 2
    assert float(documents.count) == 2


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_ends_up_on_the_right(side: str) -> None:
    """Pad ids that are also text: only the mask says what is padding."""
    rows = [{"input_ids": [7, 8]}, {"input_ids": [7, 7, 1, 2]}]
    documents = Documents.from_inputs(batch_of(rows, side=side, pad=7))
    assert documents.input_ids.tolist() == [[7, 8, 0, 0], [7, 7, 1, 2]]
    assert documents.document.tolist() == [[0, 0, -1, -1], [0, 0, 0, 0]]
    assert documents.position.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert documents.length.tolist() == [[2, 2, 0, 0], [4, 4, 4, 4]]
    assert documents.is_target.tolist() == [[True, True, False, False], [True] * 4]
    assert float(documents.count) == 2


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_columns_that_are_padding_in_every_row_are_cut(side: str, dtype: torch.dtype) -> None:
    """Rows padded to a fixed length cost nothing."""
    mask = torch.tensor([[1, 1, 0, 0, 0]]).to(dtype)
    ids = torch.tensor([[3, 4, 0, 0, 0]])
    if side == "left":
        mask, ids = mask.flip(1), torch.tensor([[0, 0, 0, 3, 4]])
    documents = Documents.from_inputs({"input_ids": ids, "attention_mask": mask})
    assert documents.input_ids.tolist() == [[3, 4]]


def test_a_row_of_padding_only_is_no_document() -> None:
    documents = read(input_ids=[[1, 2], [0, 0]], attention_mask=[[1, 1], [0, 0]])
    assert documents.document.tolist() == [[0, 0], [-1, -1]]
    assert float(documents.count) == 1


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("column", ["document_ids", "seq_idx", "position_ids"])
def test_boundaries_from_a_column(side: str, column: str) -> None:
    values = [0, 1, 2, 0, 0, 1] if column == "position_ids" else [4, 4, 4, 2, 7, 7]
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], column: values},
        {"input_ids": [7, 8], column: [0, 1] if column == "position_ids" else [0, 0]},
    ]
    documents = Documents.from_inputs(batch_of(rows, side=side))
    assert documents.document.tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, -1, -1, -1, -1]]
    assert documents.position.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert documents.length.tolist() == [[3, 3, 3, 1, 2, 2], [2, 2, 0, 0, 0, 0]]
    assert float(documents.count) == 4


def test_positions_that_do_not_restart_are_one_document() -> None:
    documents = read(input_ids=[[1, 2, 3]], position_ids=[[5, 6, 8]])
    assert documents.document.tolist() == [[0, 0, 0]]
    assert documents.position.tolist() == [[0, 1, 2]]


def test_boundaries_from_the_eos_token() -> None:
    """EOS belongs to the document it ends; one at the end of a row starts nothing."""
    ids = torch.tensor([[1, EOS, 2, 3, EOS], [EOS, 4, 5, 6, 7]])
    documents = Documents.from_inputs({"input_ids": ids}, document_masking=True, eos_token_id=EOS)
    assert documents.document.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert documents.position.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]


def test_eos_is_no_boundary_unless_asked_for() -> None:
    ids = torch.tensor([[1, EOS, 2]])
    documents = Documents.from_inputs({"input_ids": ids}, eos_token_id=EOS)
    assert documents.document.tolist() == [[0, 0, 0]]


def test_a_boundary_column_is_preferred_to_eos() -> None:
    inputs = {
        "input_ids": torch.tensor([[1, EOS, 2, 3]]),
        "document_ids": torch.tensor([[0, 0, 0, 1]]),
    }
    documents = Documents.from_inputs(inputs, document_masking=True, eos_token_id=EOS)
    assert documents.document.tolist() == [[0, 0, 0, 1]]


def test_document_masking_false_keeps_rows_whole() -> None:
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3, 4]]),
        "document_ids": torch.tensor([[0, 0, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 0, 1]]),
    }
    documents = Documents.from_inputs(inputs, document_masking=False, eos_token_id=2)
    assert documents.document.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_masked_labels_mark_a_completion(side: str) -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6], "labels": [5, 6]},
    ]
    documents = Documents.from_inputs(batch_of(rows, side=side))
    assert documents.is_target.tolist() == [[False, False, True, True], [True, True, False, False]]
    assert documents.completion_start[0].tolist() == [2] * 4
    assert documents.completion_start[1, :2].tolist() == [0, 0]


def test_completions_are_found_in_every_packed_document() -> None:
    """Turns that are masked again later do not move the start of the completion."""
    documents = read(
        input_ids=[[1, 2, 3, 4, 5, 6, 7]],
        labels=[[-100, 2, -100, -100, -100, 6, 7]],
        document_ids=[[0, 0, 0, 1, 1, 1, 1]],
    )
    assert documents.completion_start.tolist() == [[1, 1, 1, 2, 2, 2, 2]]


def test_a_document_without_targets_has_its_completion_out_of_reach() -> None:
    documents = read(input_ids=[[1, 2, 3]], labels=[[-100, -100, -100]])
    assert not documents.is_target.any()
    assert (documents.completion_start >= documents.length).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompt_length_counts_tokens_without_padding(side: str) -> None:
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}]
    batch = batch_of(rows, side=side) | {"prompt_length": torch.tensor([1, 2])}
    documents = Documents.from_inputs(batch)
    assert documents.is_target.tolist() == [[False, True, True, True], [False] * 4]
    assert documents.completion_start[0].tolist() == [1] * 4
    assert documents.completion_start[1, :2].tolist() == [2, 2]


def test_prompt_length_may_be_a_list_or_a_column() -> None:
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[1, 2], [3, 4]])}
    for prompt_length in ([1, 0], torch.tensor([[1], [0]])):
        documents = Documents.from_inputs(inputs | {"prompt_length": prompt_length})
        assert documents.completion_start.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integer_type_serves_as_token_ids(dtype: torch.dtype) -> None:
    documents = read(input_ids=torch.tensor([[1, 2]], dtype=dtype))
    assert documents.input_ids.dtype == torch.int64


def test_unknown_token_ids_are_named_with_their_row() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 70, 5], [-1, 6, 80]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]])
    with pytest.raises(
        ValueError, match=r"holds \[-1, 70\] \(first in row 1 of the batch\).*0 to 6"
    ):
        Documents.from_inputs({"input_ids": ids, "attention_mask": mask}, vocabulary_size=64)
