"""Looks ahead to the next batch, so that it can be sampled while the current one trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Following:
    """A batch to be sampled ahead.

    Attributes:
        prompts: of one process, each repeated once for every completion.
        max_tokens: most tokens of a completion.
    """

    prompts: list[Any]
    max_tokens: int


class ServerRollouts(Protocol):
    """The interface of a source of rollouts, apart from sampling.

    Attributes:
        following: the batches after the current one; None if unknown.
    """

    following: deque[Following | None]

    def start_evaluation(self) -> None:
        """Sample the next rollouts with the seeds that are the same in every evaluation."""

    def metrics(self) -> dict[str, float]:
        """Values since the last call, by name."""


class StalenessAware(ABC):
    """A trainer that corrects for rollouts older than its policy, and knows the next batches.

    Attributes:
        server_rollouts: the source of its completions, which sets this when it starts.
    """

    server_rollouts: ServerRollouts | None = None

    @abstractmethod
    def rollout_budget(self, inputs: list[dict[str, Any]] | None = None) -> int:
        """Largest number of tokens of a completion.

        Args:
            inputs: rows of a batch that is sampled ahead. Default: the current batch.
        """


class LookAhead:
    """An iterator whose later items can be looked at before it reaches them."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self._seen: deque[Any] = deque()

    def __iter__(self) -> LookAhead:
        return self

    def __next__(self) -> Any:
        return self._seen.popleft() if self._seen else next(self.source)

    def peek(self, distance: int) -> Any | None:
        """The item that comes after `distance` others; None past the end."""
        while len(self._seen) <= distance:
            try:
                self._seen.append(next(self.source))
            except StopIteration:
                return None
        return self._seen[distance]
