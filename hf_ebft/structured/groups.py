"""Groups of completions that may be spread over several processes.

TRL repeats each prompt `num_generations` times, one after the other, and distributes the rows over
processes in order. So a group consists of neighbours in the order of ranks, and may begin on one
process and end on the next. Therefore all rows are gathered first, and every process computes all
groups.

Dimension letters: R rows of this process, W rows of all processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from itertools import groupby

import torch
from accelerate.utils import gather
from torch import Tensor


def fingerprints(values: Sequence[Hashable], device: torch.device) -> Tensor:
    """A number for each value, equal on every process for equal values: (R,) int64."""
    digests = [hashlib.blake2b(repr(value).encode(), digest_size=8).digest() for value in values]
    numbers = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes in the order of ranks, (R, ...) -> (W, ...); a collective call."""
    return gather(rows.contiguous())


def own_rows(rows: Tensor, n_local: int, rank: int) -> Tensor:
    """The rows (R, ...) of (W, ...) that belong to this process."""
    return rows[rank * n_local : (rank + 1) * n_local]


def group_size(prompts: Tensor, candidates: Sequence[int | None]) -> int:
    """The number of completions of a group.

    Args:
        prompts: (W,) fingerprints of prompt and ground truth of all rows.
        candidates: possible sizes, the likeliest first (training, then evaluation); None if
            unknown. If all are unknown, each run of equal prompts is a group.

    Raises:
        ValueError: the rows do not form groups of one of these sizes.
    """
    runs = [len(list(run)) for _, run in groupby(prompts.tolist())]
    known = [size for size in candidates if size is not None]
    for size in known:
        if all(run % size == 0 for run in runs):
            return size
    if not known and len(set(runs)) == 1:
        return runs[0]
    if known:
        raise ValueError(
            f"Prompts come in runs of {_listed(runs)} equal rows, which do not divide into groups "
            f"of {' or '.join(map(str, known))} completions: give FeatureMatchingReward the "
            "num_generations (and num_generations_eval) of the trainer."
        )
    raise ValueError(
        f"Prompts come in runs of {_listed(runs)} equal rows, so the size of a group is unclear; "
        "pass num_generations to FeatureMatchingReward."
    )


def _listed(runs: list[int]) -> str:
    return ", ".join(map(str, sorted(set(runs))))
