"""Chooses the rows of training text that a preflight measures on."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hf_ebft.feature_network.corpus_whitening import choose_rows
from hf_ebft.packed.sampling import make_generator
from hf_ebft.rows.anchors import find_blocks_for
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.trainer import EBFTTrainer
from hf_ebft.training.random_streams import Stream

# Fewest rows from which an interval is computed.
FEWEST_ROWS = 4

Batch = dict[str, Any]


def choose_batches(trainer: EBFTTrainer, count: int) -> list[Batch]:
    """Choose rows of the training data; each batch has one row, read as in training.

    Args:
        trainer: a stand-in; its evaluation batch size is changed.
        count: number of rows; of a stream the first ones, else a random choice.

    Raises:
        ValueError: there are fewer rows than an interval needs.
    """
    generator = make_generator(torch.device("cpu"), trainer.args.seed, Stream.PREFLIGHT)
    rows = choose_rows(trainer.train_dataset, count, generator)
    if len(rows) < FEWEST_ROWS:
        raise ValueError(
            f"documents={count} gave {len(rows)} row(s) of training text, too few for an interval: "
            f"a preflight needs {FEWEST_ROWS} or more. Raise documents, or use more text."
        )
    trainer.args.per_device_eval_batch_size = 1
    loader = trainer.get_test_dataloader(cast(Any, rows))
    return [cast(Batch, trainer._prepare_inputs(batch)) for batch in loader]


def in_random_order(batches: list[Batch], seed: int) -> list[Batch]:
    """Shuffle batches, so that those before a deadline are a random choice, too.

    Datasets keep the rows of a file together. Without shuffling, the first rows would come from the
    first files, and neighbouring rows from the same text.
    """
    generator = make_generator(torch.device("cpu"), seed, Stream.PREFLIGHT, 0)
    order = torch.randperm(len(batches), generator=generator)
    return [batches[place] for place in order.tolist()]


def ground_truth_windows(trainer: EBFTTrainer, batch: Batch) -> Tensor:
    """(K, G) tokens of all windows of a batch of one row; K is 0 if the row has no block."""
    documents = trainer.document_reader.read(batch)
    blocks = find_blocks_for(trainer.ebft, documents)
    layout = PackedLayout(documents, blocks, 1, trainer.ebft.generate_max_len)
    return window_tokens(layout)[0][blocks.exists[0]]


def window_tokens(layout: PackedLayout) -> Tensor:
    """(B, K, G) tokens of the ground truths of a batch."""
    flat = layout.window.flatten(1)
    return layout.documents.input_ids.gather(1, flat).view(layout.window.shape)


def require_blocks(windows: list[Tensor], trainer: EBFTTrainer) -> None:
    """Raise if fewer than two rows have a block.

    Raises:
        ValueError: naming the settings that leave no room for blocks.
    """
    with_room = sum(len(tokens) > 0 for tokens in windows)
    if with_room >= 2:
        return
    settings = trainer.ebft
    raise ValueError(
        f"Only {with_room} of {len(windows)} rows have room for a block of "
        f"context_length + generate_max_len = "
        f"{settings.context_length + settings.generate_max_len} tokens, but a preflight needs 2. "
        "Use longer rows (sequence_len), or lower these two settings."
    )
