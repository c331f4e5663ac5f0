"""The data of a run: which split, of what, and what is held out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_ebft.commands.runs.options import STDLIB, STDLIB_FUNCTIONS, DataArguments
from hf_ebft.data import (
    TRANSFORMS,
    RawDataset,
    Table,
    hold_out,
    load_table,
    stdlib_functions,
    stdlib_text,
    transform_rows,
)
from hf_ebft.data.sources import TEXT_COLUMNS

logger = logging.getLogger(__name__)

# Chats as TRL and ShareGPT call them.
CHAT_COLUMNS = ("messages", "conversations")
# The data must not depend on --seed, or runs with different seeds could not be compared.
DATA_SEED = 0


def load_text(
    data: DataArguments,
    wants_eval: bool,
    read: Callable[[Table], RawDataset],
    opened: Table | None,
) -> tuple[RawDataset, RawDataset | None]:
    """Raw training text and, if it is wanted, held-out text; `read` takes it from the columns."""
    train = read(opened or load_split(data.dataset_name_or_path, data.train_split, data))
    if not wants_eval:
        return train, None
    eval_name = data.eval_dataset_name_or_path or data.dataset_name_or_path
    eval_split = data.eval_split
    if eval_split is None and eval_name.startswith((STDLIB, STDLIB_FUNCTIONS)):
        eval_split = "report"
    if eval_split is None and data.eval_dataset_name_or_path is not None:
        eval_split = "train"
    if eval_split is not None:
        if (eval_name, eval_split) == (data.dataset_name_or_path, data.train_split):
            raise ValueError(
                f"eval_split={eval_split!r} of {eval_name} is what is trained on; name another "
                "split."
            )
        return train, read(load_split(eval_name, eval_split, data))
    if data.eval_fraction == 0:
        raise ValueError(
            "There is no held-out text to measure on; set eval_split, eval_dataset_name_or_path or "
            "eval_fraction, or report_rows=0 and eval_strategy='no'."
        )
    return hold_out(train, data.eval_fraction)


def shuffled(text: RawDataset) -> RawDataset:
    """The rows in another order, the same every time."""
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(DATA_SEED))
    return text.select(order.tolist())


def load_split(name: str, split: str, data: DataArguments) -> Table:
    """One split, of the standard library or of any dataset, transformed if that is asked for."""
    if name.startswith(STDLIB):
        corpus = stdlib_text.load(name.removeprefix(STDLIB), split)
        records: Any = [{"text": document.text} for document in corpus.documents]
        table = Table(records, ("text",), f"{name}/{split}")
    elif name.startswith(STDLIB_FUNCTIONS):
        records = stdlib_functions.load(name.removeprefix(STDLIB_FUNCTIONS), split)
        table = Table(records, ("prompt", "ground_truth"), f"{name}/{split}")
    else:
        table = load_table(
            name, split, config_name=data.dataset_config_name, column=data.text_column
        )
    return transformed(table, data)


def transformed(table: Table, data: DataArguments) -> Table:
    """The prompts and ground truths that the transform makes, or the table as it is.

    Chats, which are neither text nor prompts yet, are made prompts with their last replies.
    """
    settings = json.loads(data.transform_args or "{}")
    name = data.transform
    if name is None:
        if settings:
            raise ValueError(f"transform_args={data.transform_args} needs a transform; name one.")
        chats = chat_column(table.columns) if data.text_column is None else None
        if chats is None:
            return table
        if "tools" in table.columns:
            raise ValueError(
                f"{table.name} has chats in {chats!r} and their tools in 'tools', which would not "
                "reach the prompt. Render both to 'prompt' and 'completion' texts, or take the "
                "column out."
            )
        name, settings = "chat", {"messages_column": chats}
        logger.info(
            "%s: chats in %r. The last reply of each is its ground truth; for others: --transform "
            'chat --transform_args \'{"turn": "first"}\'.',
            table.name,
            chats,
        )
    if name not in TRANSFORMS:
        raise ValueError(f"transform={name!r} is unknown; choose one of {', '.join(TRANSFORMS)}.")
    try:
        records = transform_rows(
            table.records, TRANSFORMS[name], bad_rows=data.bad_rows, **settings
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{table.name}, transform {name}: {error}") from error
    return Table(records, tuple(records[0]), table.name)


def chat_column(columns: Sequence[str]) -> str | None:
    """The column with chats, of a data set that has neither prompts nor text."""
    if "prompt" in columns or any(name in columns for name in TEXT_COLUMNS):
        return None
    return next((name for name in CHAT_COLUMNS if name in columns), None)
