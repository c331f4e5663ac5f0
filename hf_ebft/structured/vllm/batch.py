"""The requests of one batch: prompts that are sent together, and their seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_ebft.structured.vllm.answers import Completion
from hf_ebft.structured.vllm.client import Sampling, VLLMClient
from hf_ebft.structured.vllm.workers import DaemonPool


@dataclass
class Batch:
    """The open requests for one batch of one process.

    Attributes:
        prompts: the prompts, as the trainer passes them.
        prompt_ids: their token ids, one list for each completion.
        runs: (first completion, number of completions) of each request: neighbours with equal
            prompts are sent together.
        samplings: one for each request.
        futures: one for each request.
        max_tokens: largest number of tokens of a completion.
        step: optimizer step of the weights that sample.
    """

    prompts: list[Any]
    prompt_ids: list[list[int]]
    runs: list[tuple[int, int]]
    samplings: list[Sampling]
    futures: list[Future[list[Completion]]]
    max_tokens: int
    step: int

    def ask(self, index: int, pool: DaemonPool, client: VLLMClient, model: str) -> None:
        """Send one request, for the first time or again."""
        first, count = self.runs[index]
        self.futures[index] = pool.submit(
            client.complete, model, self.prompt_ids[first], count, self.samplings[index]
        )

    def wait(self) -> None:
        """Wait until all requests have ended, successfully or not."""
        for future in self.futures:
            future.exception()

    def completions(self) -> list[Completion]:
        """All completions, in the order of the prompts; every request must have succeeded."""
        return [completion for future in self.futures for completion in future.result()]


def find_runs(prompt_ids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(first entry, number of entries) of each run of equal neighbours."""
    runs = []
    first = 0
    for _, group in itertools.groupby(prompt_ids):
        count = len(list(group))
        runs.append((first, count))
        first += count
    return runs


class Seeds:
    """Seeds that differ between requests, steps and processes, and are equal in every rerun."""

    def __init__(self) -> None:
        self._step = -1
        self._calls_in_step = 0
        self._evaluation_calls = 0

    def start_evaluation(self) -> None:
        """Restart the seeds, so that every evaluation has the same seeds, whatever the step."""
        self._evaluation_calls = 0

    def draw(self, count: int, trainer: Any, training: bool) -> list[int]:
        """Seeds of the requests of one batch of this process."""
        step = trainer.state.global_step if training else -1
        if training:
            if self._step != step:
                self._step, self._calls_in_step = step, 0
            number = self._calls_in_step
            self._calls_in_step += 1
        else:
            self._evaluation_calls += 1
            number = self._evaluation_calls
        process = trainer.accelerator.process_index
        sequence = np.random.SeedSequence((trainer.args.seed, step + 1, number, process))
        return sequence.generate_state(count, np.uint32).tolist()
