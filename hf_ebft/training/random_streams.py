"""The random streams of the package: each has a name and a number here, so that all differ.

A generator is seeded from (seed, stream, place in the run) by `make_generator`. It does not touch
torch's global generator, so the order of the data and dropout do not change. Generators are not
saved in checkpoints: a resumed run draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
from transformers import TrainingArguments

from hf_ebft.packed.sampling import make_generator


class Stream(IntEnum):
    """Uses of random numbers. Changing a number here changes the results of seeded runs."""

    TRAINING = 0  # rollouts of training steps
    EVALUATION = 1  # rollouts of the trainer's evaluation
    DOCUMENTS = 2  # rollouts of `evaluate_documents`, `sample_groups`
    CORPUS_ROWS = 3  # choice of the rows on which corpus whitening is measured
    MODELS = 4  # rollouts of `measure_model`
    COMPLETIONS = 5  # completions of `CompletionMetricsCallback`
    PREFLIGHT = 10  # rows, rungs and rollouts of a preflight
    SKETCH = 11  # random signs for the compressed gradients of a preflight


def corpus_rows(seed: int) -> torch.Generator:
    """The generator that chooses the rows on which corpus whitening is measured."""
    return make_generator(torch.device("cpu"), seed, Stream.CORPUS_ROWS)


class RolloutStreams:
    """A trainer's generators of rollouts: one for each micro-batch, one for each evaluation batch.

    Args:
        args: the training arguments, for the seed and the number of this process.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self._args = args
        self._evaluation_batch: int | None = None  # None while training
        self.restart()

    def restart(self) -> None:
        """Begin a new run."""
        self._step, self._micro_batch = -1, 0

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation is in progress."""
        return self._evaluation_batch is not None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Mark an evaluation; its batches get the same generators in every evaluation."""
        self._evaluation_batch = 0
        try:
            yield
        finally:
            self._evaluation_batch = None

    def next(self, device: torch.device, global_step: int) -> torch.Generator:
        """The generator of the next batch, of training or of the evaluation in progress."""
        if self._evaluation_batch is not None:
            generator = self._make(device, Stream.EVALUATION, self._evaluation_batch)
            self._evaluation_batch += 1
            return generator
        self._micro_batch = self._micro_batch + 1 if global_step == self._step else 0
        self._step = global_step
        return self._make(device, Stream.TRAINING, global_step, self._micro_batch)

    def _make(self, device: torch.device, stream: Stream, *place: int) -> torch.Generator:
        args = self._args
        return make_generator(device, args.seed, stream, *place, args.process_index)
