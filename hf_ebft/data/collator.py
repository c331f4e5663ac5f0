"""Padding of tokenized documents into a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ebft.rows.documents import IGNORE_INDEX, LABEL_MASKS, PROMPT_LENGTH


class EBFTDataCollator:
    """Pads every per-token column on the right, whatever columns the rows have.

    Rows are dicts with `input_ids` and, optionally, `attention_mask`, `labels`,
    `completion_mask`, `assistant_masks`, `position_ids`, `document_ids` / `seq_idx` (one value per
    token) and `prompt_length` (one value per row). A missing `attention_mask` is added, so padding
    is never mistaken for text, and the tokenizer needs no pad token.

    Args:
        processing_class: tokenizer whose pad token fills `input_ids`; 0 is used if it has none.
    """

    def __init__(self, processing_class: Any = None) -> None:
        pad = getattr(processing_class, "pad_token_id", None)
        self._fill = {"input_ids": pad if pad is not None else 0, "labels": IGNORE_INDEX}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of different lengths into tensors (rows, longest row).

        Raises:
            ValueError: a row has no `input_ids` or lacks a column that others have, or a per-token
                column has another length or values that are not whole numbers.
        """
        for row in rows:
            if "input_ids" not in row:
                # Trainer drops columns that the model does not read before rows come here.
                others = f"only {sorted(row)}" if row else "nor any other column of the model"
                raise ValueError(
                    f"A row has no input_ids, {others}: tokenize the dataset first, for "
                    "example dataset.map(lambda row: tokenizer(row['text']))."
                )
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)
        names = {name: None for row in rows for name in row} | {"attention_mask": None}
        return {name: self._column(name, rows, lengths, width) for name in names}

    def _column(
        self, name: str, rows: Sequence[Mapping[str, Any]], lengths: list[int], width: int
    ) -> Tensor:
        if name != "attention_mask" and not all(name in row for row in rows):
            raise ValueError(
                f"Column {name!r} is in some rows of the batch only, so its value in the others is "
                "unknown; add it to all rows, or drop it."
            )
        if name == PROMPT_LENGTH:
            return torch.tensor([int(row[name]) for row in rows])
        padded = torch.full((len(rows), width), self._fill.get(name, 0), dtype=torch.long)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if name == "attention_mask" and name not in row:
                padded[index, :length] = 1
                continue
            values = self._values(name, row)
            if values.shape != (length,):
                raise ValueError(
                    f"Column {name!r} of a row has shape {tuple(values.shape)}, but the row has "
                    f"{length} input_ids; give one value per token, or drop the column."
                )
            padded[index, :length] = values
        return padded

    @staticmethod
    def _values(name: str, row: Mapping[str, Any]) -> Tensor:
        """A row's column as int64; raises for values that are not whole numbers."""
        try:
            values = torch.as_tensor(row[name])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Column {name!r} of a row contains values that are not numbers "
                f"({row[name]!r:.60}); drop it, or leave remove_unused_columns=True."
            ) from error
        whole = not values.is_floating_point() and values.dtype != torch.bool
        if values.numel() > 0 and not whole and name not in ("attention_mask", *LABEL_MASKS):
            raise ValueError(
                f"Column {name!r} of a row has values of type {values.dtype}, not whole numbers; "
                "convert it to int64, or drop it."
            )
        return values.long()
