"""Decoding steps captured as CUDA graphs, and replayed for batches of the same shapes.

A step launches some hundreds of small kernels, and on a GPU launching them takes longer than
running them. A graph launches them at once. It is bound to the places of its tensors, so a batch is
copied into the tensors of the one that was captured.

Capturing has not run on a GPU yet. Whatever it raises, decoding goes on without it.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Graphs that are kept. Each holds the keys and values of a batch; all share the memory of a step.
KEPT = 4
# Shapes that are remembered until they come again.
REMEMBERED = 256


class Graph(Protocol):
    """A captured step, as `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None:
        """Compute the step again."""

    def pool(self) -> Any:
        """The memory in which it keeps what exists during a step only."""


class Step(Protocol):
    """A decoder whose step is a function of tensors at fixed places."""

    tokens: Tensor
    log_probs: Tensor

    @property
    def state(self) -> list[Tensor]:
        """The tensors that a step reads and writes."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a captured step is bound to, beside its tensors."""

    @property
    def can_be_captured(self) -> bool:
        """Whether a graph could hold the step."""

    def own_documents(self) -> None:
        """Copy what belongs to others."""

    def take_inputs_of(self, other: Any) -> None:
        """Put another batch into this one's places."""

    def ready(self) -> AbstractContextManager[None]:
        """Set up for calls of `step`."""

    def step(self) -> None:
        """Compute one step."""

    def step_alone(self) -> None:
        """Compute one step from nothing but its tensors and the weights themselves."""


def capture(step: Callable[[], None], pool: Any = None) -> Graph:
    """Capture what a function launches on the current device as a CUDA graph.

    It is called twice before. The first time, libraries prepare what they must not prepare during
    the capture, and compilers compile, for which they may wait for the device. Where the function
    makes the host wait, it fails the second time: a capture that fails leaves torch's allocator
    unable to give memory back.

    Args:
        step: nothing that it allocates may be needed after it, but by itself.
        pool: of another graph, which must still exist and must never run at the same time; None: a
            new one.

    Raises:
        RuntimeError: a step that waits for the device, or cannot be captured for other reasons.
    """
    usual = torch.cuda.current_stream()
    stream = _stream_for_captures(torch.cuda.current_device())
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        step()
        with _waiting_is_an_error():
            step()
    usual.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Threads that load data may use the device meanwhile.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            step()
    finally:
        # torch stays on the stream of a capture that it cannot end.
        torch.cuda.set_stream(usual)
    return graph


@cache
def _stream_for_captures(device: int) -> torch.cuda.Stream:
    """One for each device: torch keeps memory for matrix products for every stream. Its own default
    is on the device of the first capture, whatever the device of the next.
    """
    return torch.cuda.Stream(device)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        # That it does not notice every way of waiting: what it misses, the capture notices.
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)


@dataclass
class StepGraphs:
    """Captured steps, by what they are bound to.

    Attributes:
        capture: makes a graph of a function, in a pool of memory or a new one.
        works: False once a capture has failed.
    """

    capture: Callable[[Callable[[], None], Any], Graph] = capture
    works: bool = True
    _captured: OrderedDict[Any, tuple[Step, Graph]] = field(default_factory=OrderedDict)
    _seen: OrderedDict[Any, None] = field(default_factory=OrderedDict)

    def run(self, decoder: Step, n_steps: int) -> tuple[Tensor, Tensor]:
        """Decode a batch.

        Args:
            decoder: holds the batch.
            n_steps: how often to compute a step.

        Returns:
            Tokens and log-probabilities of all steps, (G, B, m) each.
        """
        if self.works and decoder.can_be_captured:
            found = self._replayed(decoder, n_steps)
            if found is not None:
                return found
        with decoder.ready():
            for _ in range(n_steps):
                decoder.step()
        return decoder.tokens, decoder.log_probs

    def _replayed(self, decoder: Step, n_steps: int) -> tuple[Tensor, Tensor] | None:
        """`run` by a graph; None where there is none, as for shapes that come the first time."""
        key = decoder.identity
        if key not in self._captured:
            if key not in self._seen:
                _remember(self._seen, key, None, REMEMBERED)
                return None
            if not self._capture(key, decoder):
                return None
        self._captured.move_to_end(key)
        captured, graph = self._captured[key]
        if captured is not decoder:
            captured.take_inputs_of(decoder)
        for _ in range(n_steps):
            graph.replay()
        return captured.tokens.clone(), captured.log_probs.clone()

    @property
    def _pool(self) -> Any:
        """The pool of the graphs that exist; None where there is none yet.

        They may share it. All that outlives a step (tokens, log-probabilities, the number of the
        step, keys and values, biases) lies outside of it, since it is allocated before the capture.
        What lies inside is written by each replay before it is read, so that graphs may follow each
        other in any order. They do follow each other, since all are replayed by one thread in its
        current stream. The pool is taken from a graph that exists, as torch frees the pool of the
        last one that ends.
        """
        return next((graph.pool() for _, graph in self._captured.values()), None)

    def _capture(self, key: Any, decoder: Step) -> bool:
        """Capture a decoder's step, and put its batch back."""
        before = [tensor.clone() for tensor in decoder.state]
        try:
            decoder.own_documents()
            with decoder.ready():
                graph = self.capture(decoder.step_alone, self._pool)
        # Whatever a model's code, a driver or a library raises.
        except Exception as error:
            logger.warning(
                "Decoding steps cannot be captured as a CUDA graph (%s: %s): they run one operator "
                "at a time, which takes more time.",
                type(error).__name__,
                error,
                exc_info=error,
            )
            self.works = False
        else:
            _remember(self._captured, key, (decoder, graph), KEPT)
        for tensor, value in zip(decoder.state, before, strict=True):
            tensor.copy_(value)
        return self.works


def _remember(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)
