"""Reads a Trainer's batch as documents: its padding, document boundaries and labels.

Dimension letters: B rows of the batch, S' tokens of a row as collated (padding included), S tokens
of a row as read here: those of the longest row without padding, rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_ebft.rows.buckets import EXACT, Buckets

# Columns that only EBFT reads: the trainer keeps them and never passes them to the model.
PROMPT_LENGTH = "prompt_length"
DOCUMENT_COLUMNS = ("document_ids", "seq_idx")
# TRL's columns: 1 at the tokens of a completion, and 1 at the tokens that an assistant wrote.
LABEL_MASKS = ("completion_mask", "assistant_masks")
EBFT_COLUMNS = (PROMPT_LENGTH, *DOCUMENT_COLUMNS, *LABEL_MASKS)
READ_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids", *EBFT_COLUMNS)
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Documents:
    """The batch with its padding moved to the right (left padding is accepted).

    Attributes:
        input_ids: (B, S) int64; 0 at padding.
        document: (B, S) int64, which document of the row a token belongs to; -1 at padding.
        position: (B, S) int64, the token's index within its own document; 0 at padding.
        length: (B, S) int64, number of tokens of the token's own document; 0 at padding.
        is_target: (B, S) bool, tokens that labels and label masks leave unmasked. Without labels
            and label masks, all real tokens.
        completion_start: (B, S) int64, index, within the token's document, of the first token that
            labels, label masks or `prompt_length` mark as completion; -1 if nothing marks one.
    """

    input_ids: Tensor
    document: Tensor
    position: Tensor
    length: Tensor
    is_target: Tensor
    completion_start: Tensor

    @property
    def count(self) -> Tensor:
        """Number of documents in the batch, a float scalar (at least 1)."""
        return (self.document.amax(dim=1) + 1).sum().clamp(min=1).float()

    def to(self, device: torch.device) -> Documents:
        """The same documents on a device."""
        return Documents(*(getattr(self, field.name).to(device) for field in fields(self)))

    @classmethod
    def from_inputs(
        cls,
        inputs: Mapping[str, Any],
        *,
        document_masking: bool | None = None,
        eos_token_id: int | None = None,
        vocabulary_size: int | None = None,
        widths: Buckets = EXACT,
    ) -> Documents:
        """Read a batch as a data collator returns it.

        Args:
            inputs: `input_ids` (B, S'). Optional: `attention_mask` (B, S'); `labels` (B, S'), equal
                to input_ids or -100; `completion_mask` and `assistant_masks` (B, S'), 0 for tokens
                that are not targets; `prompt_length` (B,), in tokens without padding; document
                boundaries as `document_ids` or `seq_idx` (B, S'), or as `position_ids` (B, S') that
                restart at each document.
            document_masking: see `hf_ebft.config.StridedArguments`.
            eos_token_id: token that ends a document; used if `document_masking` is True and the
                batch has no column with boundaries.
            vocabulary_size: number of token ids that the model embeds; None: ids are not checked.
            widths: S is rounded up to one of these.

        Raises:
            ValueError: `input_ids` are missing, malformed or not embedded by the model; labels are
                not a masked copy of them; a `prompt_length` does not fit its row; or the document
                boundaries cannot be found.
        """
        input_ids = _read_input_ids(inputs)
        real = _read_attention_mask(inputs, input_ids)
        if vocabulary_size is not None:
            _refuse_unknown_ids(input_ids, real, vocabulary_size)
        is_target = real & _read_label_mask(inputs, input_ids, real)
        boundary_column, boundary_kind = _boundary_column(inputs, input_ids, document_masking)

        # A stable sort puts real tokens first, in their order: left padding becomes right padding.
        order = torch.argsort((~real).long(), dim=1, stable=True)
        order = order[:, : max(1, int(real.sum(dim=1).max()))]
        missing = widths.round_up(order.shape[1]) - order.shape[1]
        input_ids, real, is_target, boundary_column = (
            torch.nn.functional.pad(tensor.gather(1, order), (0, missing))
            for tensor in (input_ids, real, is_target, boundary_column)
        )
        starts = _document_starts(boundary_column, boundary_kind, real, eos_token_id)
        document = torch.where(real, starts.long().cumsum(dim=1) - 1, -1)
        column = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        first_column = torch.where(starts, column, 0).cummax(dim=1).values
        position = torch.where(real, column - first_column, 0)
        # Scatter over document indices. Padding goes to an extra slot that is never read.
        slot = torch.where(real, document, document.shape[1])
        per_document = torch.zeros(
            slot.shape[0], slot.shape[1] + 1, dtype=torch.long, device=slot.device
        )
        length = per_document.scatter_add(1, slot, real.long()).gather(1, slot)

        prompt_length = _read_prompt_length(inputs, real)
        if prompt_length is not None:
            if int((document.amax(dim=1)).max()) > 0:
                raise ValueError(
                    "prompt_length marks one prompt per row, but this batch packs several "
                    "documents into a row; mask the prompts with labels=-100 instead."
                )
            completion_start = prompt_length[:, None].expand_as(position)
            is_target = is_target & (position >= completion_start)
        elif marks_targets(inputs):
            unreached = torch.full_like(per_document, input_ids.shape[1])
            first_target = unreached.scatter_reduce(
                1, slot, torch.where(is_target, position, input_ids.shape[1]), reduce="amin"
            )
            completion_start = first_target.gather(1, slot)
        else:
            completion_start = torch.full_like(position, -1)
        return cls(
            input_ids=torch.where(real, input_ids, 0),
            document=document,
            position=position,
            length=torch.where(real, length, 0),
            is_target=is_target,
            completion_start=completion_start,
        )


@dataclass(frozen=True)
class DocumentReader:
    """How a run reads its batches: the arguments of `Documents.from_inputs`, kept in one place.

    Attributes:
        document_masking, eos_token_id, vocabulary_size, widths: see `Documents.from_inputs`.
        model_inputs: names of the arguments of the model's own forward. If a batch has a column of
            such a name that EBFT does not read, `read` raises: evaluation would use the column and
            training would not. Columns that are None or False are allowed (`use_cache=False`).
    """

    document_masking: bool | None = None
    eos_token_id: int | None = None
    vocabulary_size: int | None = None
    widths: Buckets = EXACT
    model_inputs: frozenset[str] = frozenset()

    def read(self, inputs: Mapping[str, Any], device: torch.device | None = None) -> Documents:
        """The documents of a batch, on a device (default: the device of its tensors).

        Raises:
            ValueError: `Documents.from_inputs` refuses the batch, or the batch has inputs of the
                model that EBFT does not pass on.
        """
        given = {name for name, value in inputs.items() if value is not None and value is not False}
        unread = sorted((self.model_inputs & given).difference(READ_COLUMNS))
        if unread and "input_ids" in inputs:  # without input_ids, from_inputs raises a better error
            raise ValueError(
                f"The batch has {', '.join(unread)}, which the model takes as input, but EBFT "
                "samples and trains on token ids alone: evaluation would use these inputs and "
                "training would not. Drop these columns (dataset.remove_columns, or "
                "tokenizer(..., return_token_type_ids=False)), or leave them out in the data "
                "collator."
            )
        if device is not None:
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in inputs.items()
            }
        return Documents.from_inputs(
            inputs,
            document_masking=self.document_masking,
            eos_token_id=self.eos_token_id,
            vocabulary_size=self.vocabulary_size,
            widths=self.widths,
        )


def predicted_targets(documents: Documents) -> Tensor:
    """(B, S) bool: labelled tokens that have a predecessor in their document."""
    return documents.is_target & (documents.position > 0)


def split_rows(inputs: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
    """Split a batch into parts of at most `size` rows; a batch that is small enough stays whole.

    Args:
        inputs: the batch.
        size: most rows of a part; None: do not split.

    Raises:
        ValueError: a column does not have one entry per row.
    """
    rows = len(_read_input_ids(inputs))
    if size is None or rows <= size:
        return [inputs]
    flags = {name for name, value in inputs.items() if value is None or isinstance(value, bool)}
    columns = {name: column for name, column in inputs.items() if name not in flags}
    uneven = [name for name, column in columns.items() if _entries(column) != rows]
    if uneven:
        raise ValueError(
            f"rollout_batch_size={size} splits a batch of {rows} rows, but its columns "
            f"{', '.join(uneven)} do not have one entry per row. Drop them in the data collator, "
            "or leave rollout_batch_size unset."
        )
    return [
        {name: column[start : start + size] for name, column in columns.items()}
        | {name: inputs[name] for name in flags}
        for start in range(0, rows, size)
    ]


def _entries(column: Any) -> int | None:
    """Number of entries of a column of a batch; None for a single value."""
    if isinstance(column, Tensor) and column.dim() == 0:
        return None
    return len(column) if isinstance(column, Sized) else None


def _read_input_ids(inputs: Mapping[str, Any]) -> Tensor:
    input_ids = inputs.get("input_ids")
    if input_ids is None:
        raise ValueError(
            f"The batch has no input_ids (it has {sorted(inputs)}): EBFT needs the token ids of "
            "the documents. Tokenize the dataset, or let the data collator keep input_ids."
        )
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or 0 in input_ids.shape:
        shape = (
            tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise ValueError(
            "input_ids must be a tensor of shape (rows, tokens) with at least one of each, "
            f"not {shape}."
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids must hold token ids, whole numbers, not {input_ids.dtype}; convert the "
            "column to int64 (rounding here would train on other tokens)."
        )
    return input_ids.long()


def _refuse_unknown_ids(ids: Tensor, real: Tensor, vocabulary_size: int) -> None:
    """Raise for ids outside the vocabulary.

    On a GPU the embedding would fail with a device-side assert that names neither id nor row.
    """
    unknown = real & ((ids < 0) | (ids >= vocabulary_size))
    if bool(unknown.any()):
        row = int(unknown.any(dim=1).int().argmax())
        raise ValueError(
            f"input_ids holds {ids[unknown].unique().tolist()[:5]} (first in row {row} of the "
            "batch), but the model embeds token ids from "
            f"0 to {vocabulary_size - 1}. Tokenize with the model's own tokenizer. If you added "
            "tokens to it, call model.resize_token_embeddings(len(tokenizer))."
        )


def _same_shape(inputs: Mapping[str, Any], name: str, input_ids: Tensor) -> Tensor | None:
    tensor = inputs.get(name)
    if tensor is not None and tensor.shape != input_ids.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but input_ids has shape "
            f"{tuple(input_ids.shape)}; the shapes must be the same."
        )
    return tensor


def _read_attention_mask(inputs: Mapping[str, Any], input_ids: Tensor) -> Tensor:
    attention_mask = _same_shape(inputs, "attention_mask", input_ids)
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.bool()


def marks_targets(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch marks its targets with labels or label masks."""
    return any(inputs.get(name) is not None for name in ("labels", *LABEL_MASKS))


def _read_label_mask(inputs: Mapping[str, Any], input_ids: Tensor, real: Tensor) -> Tensor:
    unmasked = _read_labels(inputs, input_ids, real)
    for name in LABEL_MASKS:
        mask = _same_shape(inputs, name, input_ids)
        if mask is not None:
            unmasked = unmasked & mask.bool()
    return unmasked


def _read_labels(inputs: Mapping[str, Any], input_ids: Tensor, real: Tensor) -> Tensor:
    labels = _same_shape(inputs, "labels", input_ids)
    if labels is None:
        return torch.ones_like(real)
    unmasked = labels != IGNORE_INDEX
    if bool((unmasked & real & (labels != input_ids)).any()):
        raise ValueError(
            "labels differ from input_ids at unmasked tokens. EBFT takes the ground truth from "
            "input_ids, so labels must be a copy of input_ids with -100 at tokens that are not "
            "targets, and not shifted (the trainer shifts)."
        )
    return unmasked


def _read_prompt_length(inputs: Mapping[str, Any], real: Tensor) -> Tensor | None:
    prompt_length = inputs.get(PROMPT_LENGTH)
    if prompt_length is None:
        return None
    prompt_length = torch.as_tensor(prompt_length, device=real.device).long().reshape(-1)
    if prompt_length.shape[0] != real.shape[0]:
        raise ValueError(
            f"prompt_length has {prompt_length.shape[0]} entries for {real.shape[0]} rows; "
            "give one number of tokens per row."
        )
    if bool(((prompt_length < 0) | (prompt_length > real.sum(dim=1))).any()):
        raise ValueError(
            f"prompt_length={prompt_length.tolist()} must lie between 0 and the rows' lengths "
            f"without padding, {real.sum(dim=1).tolist()}."
        )
    return prompt_length


def _boundary_column(
    inputs: Mapping[str, Any], input_ids: Tensor, document_masking: bool | None
) -> tuple[Tensor, str]:
    """The column that marks the document boundaries, and how to read it."""
    if document_masking is False:
        return input_ids, "none"
    for name in DOCUMENT_COLUMNS:
        ids = _same_shape(inputs, name, input_ids)
        if ids is not None:
            return ids.long(), "ids"
    position_ids = _same_shape(inputs, "position_ids", input_ids)
    if position_ids is not None:
        return position_ids.long(), "positions"
    return input_ids, "eos" if document_masking else "none"


def _document_starts(column: Tensor, kind: str, real: Tensor, eos_token_id: int | None) -> Tensor:
    """(B, S) bool: first tokens of documents, in rows whose padding is on the right."""
    starts = torch.zeros_like(real)
    starts[:, 0] = True
    if kind == "ids":
        starts[:, 1:] = column[:, 1:] != column[:, :-1]
    elif kind == "positions":
        starts[:, 1:] = column[:, 1:] <= column[:, :-1]
    elif kind == "eos":
        if eos_token_id is None:
            raise ValueError(
                "document_masking=True, but the batch has no document_ids, seq_idx or position_ids "
                "and no EOS token is known. Add one of these columns, pass a processing_class with "
                "an eos_token, or leave document_masking unset."
            )
        starts[:, 1:] = column[:, :-1] == eos_token_id
    return starts & real
