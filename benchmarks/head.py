"""Compares our log-probabilities, forward and backward, with plain `log_softmax` and `gather`.

    python benchmarks/head.py

The two are measured in turns, in one process with one thread. Both compute the head once more in
the backward pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from unittest.mock import patch

import torch
from memory import peak_bytes
from torch import Tensor

from hf_ebft.packed import targets, token_log_probs

TURNS = 7
TOKEN_LOG_PROBS = {
    "ours": token_log_probs.token_log_probs,
    "plain": token_log_probs.plain_token_log_probs,
}


@dataclass(frozen=True)
class Shape:
    """Rows of states, their width, entries of the vocabulary, rows of a chunk."""

    rows: int
    width: int
    vocabulary: int
    chunk: int
    dtype: torch.dtype = torch.float32

    def work(self, temperature: float) -> Callable[[], None]:
        """One forward and backward pass."""
        states = torch.randn(self.rows, self.width, dtype=self.dtype).requires_grad_()
        head = (0.05 * torch.randn(self.vocabulary, self.width)).to(self.dtype).requires_grad_()
        index = torch.arange(self.rows)
        tokens = torch.randint(self.vocabulary, (self.rows, 1))
        weights = torch.randn(self.rows, 1)

        def to_logits(chunk: Tensor) -> Tensor:
            return chunk @ head.T

        def work() -> None:
            states.grad = head.grad = None
            found = targets.target_log_probs(
                states, index, tokens, to_logits, temperature=temperature, chunk_size=self.chunk
            )
            (found * weights).sum().backward()

        return work


SHAPES = (
    Shape(2048, 192, 8192, 1024),
    Shape(2048, 192, 8192, 1024, torch.bfloat16),
    Shape(1024, 576, 49152, 512),
)


def compare(shape: Shape, temperature: float) -> str:
    """A line of the table."""
    work = shape.work(temperature)
    seconds: dict[str, list[float]] = {name: [] for name in TOKEN_LOG_PROBS}
    memory = {}
    for name, function in TOKEN_LOG_PROBS.items():
        with patch.object(targets, "token_log_probs", function):
            work()  # to warm up
            memory[name] = peak_bytes(work, torch.device("cpu"))
    for _ in range(TURNS):
        for name, function in TOKEN_LOG_PROBS.items():
            with patch.object(targets, "token_log_probs", function):
                start = time.thread_time()
                work()
                seconds[name].append(time.thread_time() - start)
    ours, plain = (statistics.median(seconds[name]) for name in TOKEN_LOG_PROBS)
    mib = " | ".join(f"{memory[name] / 2**20:.0f}" for name in TOKEN_LOG_PROBS)
    what = f"{shape.rows} x {shape.width} x {shape.vocabulary}, {shape.dtype}, {temperature}"
    return f"| {what} | {ours:.2f} | {plain:.2f} | {ours / plain:.2f} | {mib} |"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| rows x width x vocabulary, dtype, temperature | ours, s | plain, s | ratio | ", end="")
    print("ours, MiB | plain, MiB |\n|---|---|---|---|---|---|")
    for shape, temperature in product(SHAPES, (1.0, 0.6)):
        print(compare(shape, temperature), flush=True)


if __name__ == "__main__":
    main()
