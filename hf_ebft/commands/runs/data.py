"""The data of a run: its data sets, their splits and what is held out."""

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
    mix,
    stdlib_functions,
    stdlib_text,
    transform_rows,
)
from hf_ebft.data.sources import TEXT_COLUMNS

logger = logging.getLogger(__name__)

# Names that TRL and ShareGPT give to a column with chats.
CHAT_COLUMNS = ("messages", "conversations")
# The data must not depend on --seed, or runs with different seeds could not be compared.
DATA_SEED = 0


def load_text(
    data: DataArguments,
    wants_eval: bool,
    read: Callable[[Table], RawDataset],
    opened: Table | None,
) -> tuple[RawDataset, RawDataset | None]:
    """Raw training text and, if it is wanted, held-out text.

    Args:
        data: the options. Of several data sets, both the training text and the held-out text are
            mixed.
        wants_eval: whether held-out text is wanted.
        read: takes the text from the columns of a table.
        opened: the table of the first data set, if it is open already.
    """
    elsewhere = data.eval_dataset_name_or_path
    parts, held_out = [], []
    for number, name in enumerate(data.dataset_name_or_path):
        table = opened if number == 0 and opened else load_split(name, data.train_split, data)
        part = read(table)
        if wants_eval and elsewhere is None:
            part, rest = split_off_held_out(name, part, data, read)
            held_out.append(rest)
        parts.append(part)
    train = mix(parts, data.dataset_weights, DATA_SEED)
    if not wants_eval:
        return train, None
    if elsewhere is None:
        return train, mix(held_out, data.dataset_weights, DATA_SEED)
    split = data.eval_split or ("report" if is_stdlib(elsewhere) else "train")
    _refuse_training_split(elsewhere, split, data)
    return train, read(load_split(elsewhere, split, data))


def split_off_held_out(
    name: str, part: RawDataset, data: DataArguments, read: Callable[[Table], RawDataset]
) -> tuple[RawDataset, RawDataset]:
    """The training text and the held-out text of one data set.

    The held-out text is another split if there is one, else a share of `part`.
    """
    split = data.eval_split or ("report" if is_stdlib(name) else None)
    if split is not None:
        _refuse_training_split(name, split, data)
        return part, read(load_split(name, split, data))
    if data.eval_fraction == 0:
        raise ValueError(
            "eval_fraction=0 leaves no held-out text to measure on. Set eval_split, "
            "eval_dataset_name_or_path or a larger eval_fraction; or set report_rows=0 and "
            "eval_strategy='no'."
        )
    return hold_out(part, data.eval_fraction)


def is_stdlib(name: str) -> bool:
    """Whether a data set comes with Python. Such data sets have a split `report`."""
    return name.startswith((STDLIB, STDLIB_FUNCTIONS))


def _refuse_training_split(name: str, split: str, data: DataArguments) -> None:
    if name in data.dataset_name_or_path and split == data.train_split:
        raise ValueError(
            f"eval_split={split!r} of {name} is the split to train on, so it is not held out; "
            "name another split."
        )


def shuffled(text: RawDataset) -> RawDataset:
    """The rows in a random order that is the same in every run."""
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(DATA_SEED))
    return text.select(order.tolist())


def load_split(name: str, split: str, data: DataArguments) -> Table:
    """Load one split of a data set, and apply the transform if one is set."""
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
    """The table after the transform, or unchanged if none is set.

    Without a transform, a table of chats gets prompts with the last reply as ground truth.
    """
    settings = json.loads(data.transform_args or "{}")
    name = data.transform
    if name is None:
        if settings:
            raise ValueError(
                f"transform_args={data.transform_args} would have no effect without a transform; "
                f"set transform to one of {', '.join(TRANSFORMS)}, or drop transform_args."
            )
        chats = chat_column(table.columns) if data.text_column is None else None
        if chats is None:
            return table
        if "tools" in table.columns:
            raise ValueError(
                f"{table.name} has chats in {chats!r} and tools in 'tools', but the tools would "
                "not be rendered into the prompt. Render both to 'prompt' and 'completion' texts, "
                "or remove the column 'tools'."
            )
        name, settings = "chat", {"messages_column": chats}
        logger.info(
            "%s: chats in %r. The last reply of each chat is its ground truth; for another one: "
            '--transform chat --transform_args \'{"turn": "first"}\'.',
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
    """The column with chats, or None if there is none or the data set has prompts or text."""
    if "prompt" in columns or any(name in columns for name in TEXT_COLUMNS):
        return None
    return next((name for name in CHAT_COLUMNS if name in columns), None)
