"""Every random stream of the package has its name and number here, so that no two are the same.

A generator is seeded from (seed, stream, place in the run) by `make_generator`. It leaves torch's
global generator alone, and with it the order of the data and dropout. It needs no place in
checkpoints: a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
from transformers import TrainingArguments

from hf_ebft.packed.sampling import make_generator


class Stream(IntEnum):
    """What the random numbers are for. Changing a number changes what seeded runs draw."""

    TRAINING = 0  # rollouts of training steps
    EVALUATION = 1  # rollouts of the trainer's evaluation
    DOCUMENTS = 2  # rollouts of `evaluate_documents`, `sample_groups`
    CORPUS_ROWS = 3  # which rows corpus whitening is measured on
    MODELS = 4  # rollouts of `measure_model`
    COMPLETIONS = 5  # completions of `CompletionMetricsCallback`
    PREFLIGHT = 10  # rows, rungs and rollouts of a preflight
    SKETCH = 11  # signs of gradients of a preflight that are folded


def corpus_rows(seed: int) -> torch.Generator:
    """The generator that chooses the rows which corpus whitening is measured on."""
    return make_generator(torch.device("cpu"), seed, Stream.CORPUS_ROWS)


class RolloutStreams:
    """A trainer's generators of rollouts: one for each micro-batch, one for each evaluation batch.

    Args:
        args: its seed, and which process this is.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self._args = args
        self._evaluation_batch: int | None = None  # None while training
        self.restart()

    def restart(self) -> None:
        """A new run begins."""
        self._step, self._micro_batch = -1, 0

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation is going on."""
        return self._evaluation_batch is not None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """An evaluation: its batches get the same generators in every evaluation."""
        self._evaluation_batch = 0
        try:
            yield
        finally:
            self._evaluation_batch = None

    def next(self, device: torch.device, global_step: int) -> torch.Generator:
        """The generator of the next batch: of an optimizer step, or of the evaluation."""
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
