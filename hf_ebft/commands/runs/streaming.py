"""Rows of strided mode from a stream: a data set that is read during training."""

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

# Number of documents that are read, tokenized and packed together.
BATCH = 256
# Number of documents in the shuffle buffer.
SHUFFLED = 1000
# Number of held-out documents if max_eval_rows is not set.
HELD_OUT = 256


class RowMaker:
    """Makes rows from batches of a stream, for `IterableDataset.map(..., batched=True)`.

    It logs how many documents of a batch it leaves out.

    Args:
        data, args: the options.
        tokenizer: turns text into rows.
        name: name of the data set, for messages.
    """

    def __init__(self, data: DataArguments, args: EBFTConfig, tokenizer: Any, name: str) -> None:
        self.data = data
        self.args = args
        self.tokenizer = tokenizer
        self.name = name

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """`input_ids`, with `labels` or `document_ids` if the rows have them."""
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
        listed = [rows[number] for number in range(len(rows))]
        return {column: [row[column].tolist() for row in listed] for column in listed[0]}

    def tokenized(self, records: Sequence[dict[str, Any]], *, pack: bool) -> TokenizedRows:
        """The rows of some documents."""
        table = Table(list(records), tuple(records[0]), self.name)
        text = raw_text(transformed(table, self.data), self.data, self.tokenizer)
        return tokenize(text, self.tokenizer, self.data, self.args, pack=pack)


def load_rows(
    data: DataArguments, tokenizer: Any, args: EBFTConfig, *, wants_eval: bool
) -> tuple[Any, TokenizedRows | None]:
    """A stream of rows to train on and, if they are wanted, held-out rows.

    The first documents of the stream are held out, or those of another split or data set if the
    options name one.

    Args:
        data: the options.
        tokenizer: turns text into rows.
        args: settings of the blocks, and `max_steps`.
        wants_eval: whether held-out rows are wanted.

    Returns:
        A `datasets.IterableDataset` of training rows, and the held-out rows or None.

    Raises:
        ValueError: options that a stream cannot honour, or no data.
    """
    refuse_options_without_streaming(data, args)
    (name,) = data.dataset_name_or_path
    stream = _open(name, data.train_split, data)
    held_out, train = None, stream.records
    if wants_eval:
        count = data.max_eval_rows or HELD_OUT
        source = data.eval_dataset_name_or_path or name
        split = data.eval_split or ("train" if source != name else data.train_split)
        same = (source, split) == (name, data.train_split)
        held_out_stream = (stream if same else _open(source, split, data)).records
        records = list(held_out_stream.take(count + 1))  # one more shows that something is left
        if same and len(records) <= count:
            raise ValueError(
                f"{name} has {len(records)} documents, and the first {count} of a stream are held "
                "out, so none is left to train on. Lower max_eval_rows, set eval_split or "
                "eval_dataset_name_or_path, or leave out streaming."
            )
        records = records[:count]
        if same:
            train = train.skip(len(records))
        held_out = RowMaker(data, args, tokenizer, source).tokenized(records, pack=False)
        say(args, f"Held-out text, the first {len(records)} of {source}: {held_out.counts}")
    say(
        args,
        f"Training text, {name}, is read during training, for max_steps={args.max_steps} steps: "
        f"in its own order, shuffled within a buffer of {SHUFFLED} documents.",
    )
    train = train.shuffle(seed=args.seed, buffer_size=SHUFFLED).map(
        RowMaker(data, args, tokenizer, name),
        batched=True,
        batch_size=BATCH,
        remove_columns=list(stream.columns),
    )
    return train, held_out


def _open(name: str, split: str, data: DataArguments) -> Table:
    return open_stream(name, split, config_name=data.dataset_config_name, column=data.text_column)


def refuse_options_without_streaming(data: DataArguments, args: EBFTConfig) -> None:
    """Raise for options that need to know all of the data.

    Raises:
        ValueError: naming the option and what to do instead.
    """
    if args.max_steps <= 0:
        raise ValueError(
            f"streaming=True with max_steps={args.max_steps}: the length of a stream is unknown, "
            "so the run and its learning-rate schedule need a number of optimizer steps. Set "
            "max_steps."
        )
    if len(data.dataset_name_or_path) > 1:
        raise ValueError(
            f"streaming=True reads one data set, not {len(data.dataset_name_or_path)} "
            f"({data.shown_name}); name one, or leave streaming out to mix them."
        )
    if is_stdlib(data.dataset_name_or_path[0]):
        raise ValueError(
            f"streaming=True is for table files and the hub, but {data.shown_name} comes with "
            "Python. Leave streaming out."
        )
    if data.max_train_rows is not None:
        raise ValueError(
            f"max_train_rows={data.max_train_rows} with streaming=True: documents of a stream "
            "cannot be chosen at random. Leave it out; max_steps limits how much is read."
        )
    if data.eval_fraction != DataArguments().eval_fraction:
        raise ValueError(
            f"eval_fraction={data.eval_fraction} with streaming=True: the length of a stream is "
            "unknown, so a share of it is, too. Leave it out to hold out the first max_eval_rows "
            f"documents ({HELD_OUT} by default), or set eval_split."
        )
