"""Rows of strided mode from a data set that is read while it is trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hf_ebft import EBFTConfig
from hf_ebft.commands.runs.console import say
from hf_ebft.commands.runs.data import is_stdlib, transformed
from hf_ebft.commands.runs.options import DataArguments
from hf_ebft.commands.runs.text import raw_text, tokenize
from hf_ebft.data import NoRowsError, Table, TokenizedRows, open_stream

logger = logging.getLogger(__name__)

# Documents that are read, tokenized and packed together.
BATCH = 256
# Documents among which the next one is chosen at random.
SHUFFLED = 1000
# Documents held out without max_eval_rows.
HELD_OUT = 256


class Rows:
    """Makes rows of a batch of a stream, for `IterableDataset.map(..., batched=True)`.

    What is left out of a batch is logged with its number.

    Args:
        data, args: the options.
        tokenizer: turns text into rows.
        name: of the data set, for messages.
    """

    def __init__(self, data: DataArguments, args: EBFTConfig, tokenizer: Any, name: str) -> None:
        self.data = data
        self.args = args
        self.tokenizer = tokenizer
        self.name = name

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """`input_ids`, with `labels` or `document_ids` where there are any."""
        records = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        try:
            rows = self.tokenized(records, pack=self.data.pack)
        except NoRowsError as error:
            logger.warning("A batch of %d documents gives no row: %s", len(records), error)
            return {"input_ids": []}
        counts = rows.counts
        if counts.short or counts.empty:
            logger.info("%s", counts)
        made = [rows[number] for number in range(len(rows))]
        return {column: [row[column].tolist() for row in made] for column in made[0]}

    def tokenized(self, records: Sequence[dict[str, Any]], *, pack: bool) -> TokenizedRows:
        """Rows of some documents."""
        table = Table(list(records), tuple(records[0]), self.name)
        text = raw_text(transformed(table, self.data), self.data, self.tokenizer)
        return tokenize(text, self.tokenizer, self.data, self.args, pack=pack)


def load_rows(
    data: DataArguments, tokenizer: Any, args: EBFTConfig, *, wants_eval: bool
) -> tuple[Any, TokenizedRows | None]:
    """A stream of rows to train on and, if they are wanted, held-out rows.

    Held out are the first documents of the stream, or of another split or data set if one is named.

    Args:
        data: which.
        tokenizer: turns text into rows.
        args: lengths of blocks, and `max_steps`.
        wants_eval: whether held-out rows are wanted.

    Returns:
        A `datasets.IterableDataset`, and rows.

    Raises:
        ValueError: options that a stream cannot honour, or no data.
    """
    refuse_what_cannot_be_streamed(data, args)
    (name,) = data.dataset_name_or_path
    stream = _open(name, data.train_split, data)
    held_out, train = None, stream.records
    if wants_eval:
        count = data.max_eval_rows or HELD_OUT
        source = data.eval_dataset_name_or_path or name
        split = data.eval_split or ("train" if source != name else data.train_split)
        same = (source, split) == (name, data.train_split)
        records = list((stream if same else _open(source, split, data)).records.take(count))
        if same:
            train = train.skip(len(records))
        held_out = Rows(data, args, tokenizer, source).tokenized(records, pack=False)
        say(args, f"Held-out text, the first {len(records)} of {source}: {held_out.counts}")
    say(
        args,
        f"Training text, {name}, is read while it is trained on, for max_steps={args.max_steps} "
        f"steps: in its order but for shuffling among {SHUFFLED} documents.",
    )
    train = train.shuffle(seed=args.seed, buffer_size=SHUFFLED).map(
        Rows(data, args, tokenizer, name),
        batched=True,
        batch_size=BATCH,
        remove_columns=list(stream.columns),
    )
    return train, held_out


def _open(name: str, split: str, data: DataArguments) -> Table:
    return open_stream(name, split, config_name=data.dataset_config_name, column=data.text_column)


def refuse_what_cannot_be_streamed(data: DataArguments, args: EBFTConfig) -> None:
    """Raise for options that need to know all of the data.

    Raises:
        ValueError: with what to do instead.
    """
    if args.max_steps <= 0:
        raise ValueError(
            f"streaming=True with max_steps={args.max_steps}: a stream does not say how long it "
            "is, so the run and its learning rate need a number of optimizer steps. Set max_steps."
        )
    if len(data.dataset_name_or_path) > 1:
        raise ValueError(
            f"streaming=True reads one data set, not {len(data.dataset_name_or_path)} "
            f"({data.shown_name}); name one, or leave streaming out to mix them."
        )
    if is_stdlib(data.dataset_name_or_path[0]):
        raise ValueError(
            f"streaming=True is for tables and the hub; {data.shown_name} is here already. Leave "
            "it out."
        )
    if data.max_train_rows is not None:
        raise ValueError(
            f"max_train_rows={data.max_train_rows} cannot choose documents of a stream at random; "
            "max_steps says how much of it is read."
        )
    if data.eval_fraction != DataArguments().eval_fraction:
        raise ValueError(
            f"eval_fraction={data.eval_fraction} of a stream is not known; its first max_eval_rows "
            f"documents are held out ({HELD_OUT} by default), or name eval_split."
        )
