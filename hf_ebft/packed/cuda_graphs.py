"""Captures decoding steps as CUDA graphs and replays them for batches of the same shapes.

A step launches some hundreds of small kernels, and on a GPU launching them takes longer than
running them. A graph launches all of them at once. It uses fixed memory addresses, so a new batch
is copied into the tensors of the batch that was captured.

Capturing has not run on a GPU yet. If it raises an error, decoding continues without it.
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

# Graphs that are kept. Each holds the keys and values of a batch; all share one step's temporary
# memory.
KEPT = 4
# Shapes seen once that are remembered, so that their second occurrence is recognised.
REMEMBERED = 256


class Graph(Protocol):
    """A captured step: the part of `torch.cuda.CUDAGraph` that is used here."""

    def replay(self) -> None:
        """Compute the step again."""

    def pool(self) -> Any:
        """The memory pool of the step's temporary tensors."""


class Step(Protocol):
    """A decoder whose step is a function of tensors at fixed addresses."""

    tokens: Tensor
    log_probs: Tensor

    @property
    def state(self) -> list[Tensor]:
        """The tensors that a step reads and writes."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """Everything a captured step depends on, except the content of its tensors."""

    @property
    def can_be_captured(self) -> bool:
        """Whether the step can be captured as a CUDA graph."""

    def own_documents(self) -> None:
        """Copy the tensors that other code owns (the documents' keys and values)."""

    def take_inputs_of(self, other: Any) -> None:
        """Copy another batch of the same shapes into this decoder's tensors."""

    def ready(self) -> AbstractContextManager[None]:
        """Prepare for calls of `step`, within the context."""

    def step(self) -> None:
        """Compute one step."""

    def step_alone(self) -> None:
        """Compute one step without cached copies of weights, for a capture."""


def capture(step: Callable[[], None], pool: Any = None) -> Graph:
    """Capture the kernels that a function launches on the current device as a CUDA graph.

    The function is first called twice without capturing. In the first call, libraries initialise
    and compilers compile; both may wait for the device, which is impossible during a capture. The
    second call raises if the function makes the host wait for the device. This check comes before
    the capture because a failed capture leaves torch's allocator unable to free memory.

    Args:
        step: the function. Memory that it allocates may be used only by itself.
        pool: memory pool of another graph, which must still exist and must never run at the same
            time; None: use a new pool.

    Raises:
        RuntimeError: the function waits for the device, or cannot be captured for other reasons.
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
    """The stream for captures on a device: always the same one.

    torch keeps a workspace for matrix products per stream, so new streams would cost memory.
    torch's default stream for captures belongs to the device of the first capture, even if a later
    capture is on another device.
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
        # torch warns that this mode does not detect every wait. The capture detects the others.
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)


@dataclass
class StepGraphs:
    """Captured steps, by the `identity` of their decoders.

    Attributes:
        capture: captures a function as a graph, in the given memory pool (None: a new one).
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
            n_steps: number of decoding steps.

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
        """`run` by replaying a graph; None if there is no graph.

        There is none when shapes occur for the first time, or if the capture fails.
        """
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
        """The memory pool that all graphs share; None if there is no graph yet.

        Sharing is safe. Tensors that outlive a step (tokens, log-probabilities, the number of the
        step, keys and values, biases) are allocated before the capture, outside the pool. Tensors
        inside the pool are written by each replay before they are read, so graphs may run in any
        order. They never run at the same time, because one thread replays all of them in its
        current stream. The pool is read from an existing graph, because torch frees a pool together
        with the last graph that uses it.
        """
        return next((graph.pool() for _, graph in self._captured.values()), None)

    def _capture(self, key: Any, decoder: Step) -> bool:
        """Capture a decoder's step, then restore the tensors that capturing has changed.

        Returns:
            Whether the capture succeeded.
        """
        before = [tensor.clone() for tensor in decoder.state]
        try:
            decoder.own_documents()
            with decoder.ready():
                graph = self.capture(decoder.step_alone, self._pool)
        # A model's code, a driver or a library may raise anything.
        except Exception as error:
            logger.warning(
                "Decoding steps cannot be captured as a CUDA graph (%s: %s). They run one operator "
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
