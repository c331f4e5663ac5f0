"""Log-probabilities of target tokens, with a backward pass that needs little memory.

`logits.log_softmax(-1).gather(1, targets)` keeps a float32 copy of the logits for its backward
pass, which makes two more copies. This module keeps only the logits, in their own dtype, and
computes the gradient by its formula: d log p(a) / d logit(b) = (1 if a = b else 0) - p(b).

Dimension letters: c rows of a chunk, t targets of a row, V vocabulary.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of target tokens; the values are those of `plain_token_log_probs`.

    Args:
        logits: (c, V), of any floating dtype.
        targets: (c, t) int64.
        temperature: > 0, divides the logits.

    Returns:
        (c, t) float32.
    """
    found: Tensor = _TokenLogProbs.apply(logits, targets, temperature)
    return found


def plain_token_log_probs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """`token_log_probs` in operators that a compiler can fuse; same arguments and result."""
    log_probs = at_temperature(logits, temperature).log_softmax(dim=-1)
    if torch.compiler.is_compiling():
        # inductor fuses the gradient of this loss into one kernel. The gradient of `gather` would
        # write, add to and read a matrix of zeros (c, V).
        columns = targets.unbind(dim=1)
        losses = [nn.functional.nll_loss(log_probs, one, reduction="none") for one in columns]
        return -torch.stack(losses, dim=1)
    return log_probs.gather(1, targets)


def contexts_of_checkpoint() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for `torch.utils.checkpoint.checkpoint`: for the forward pass and its recomputation.

    The backward pass does not read the log-probabilities, so in the recomputation `token_log_probs`
    does not compute their values.
    """
    return nullcontext(), _ValuesLeftOut()


class _Values(threading.local):
    """Whether values are left out, per thread: on a GPU the backward pass has its own thread."""

    left_out = False


_values = _Values()


class _ValuesLeftOut:
    """A context that may be entered several times, once per backward pass through a kept graph."""

    def __enter__(self) -> None:
        self._before, _values.left_out = _values.left_out, True

    def __exit__(self, *exception: object) -> None:
        _values.left_out = self._before


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        if _values.left_out:
            return logits.new_empty(targets.shape, dtype=torch.float32)
        return plain_token_log_probs(logits, targets, temperature)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """(c, t) -> (c, V)."""
        logits, targets = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        of_logits = torch.softmax(at_temperature(logits, ctx.temperature), dim=-1)
        total = -gradient.sum(dim=1, keepdim=True)
        if torch.is_grad_enabled():  # second derivatives need the probabilities unchanged
            of_logits = (of_logits * total).scatter_add(1, targets, gradient)
        else:
            of_logits.mul_(total).scatter_add_(1, targets, gradient)
        return of_logits.to(logits.dtype), None, None


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """The logits in float32, divided by the temperature."""
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature
