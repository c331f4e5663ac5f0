"""Parts that our attention functions share: arguments, soft caps, sinks, and plain attention.

Dimension letters: B rows of the batch, H heads of keys and values, A query heads, Q queries and C
keys, E and F widths of a head (keys, values).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# Added to the scores of keys that a query does not see. It is finite, so that a query that sees
# nothing in one part of the keys has a finite result there. That result gets weight 0 when it is
# combined with a part in which the query sees something.
HIDDEN = -1e30
# Keyword arguments with which transformers' models ask an attention function to change the scores.
_CHANGES_OF_SCORES = ("position_bias", "s_aux", "softcap")


def changes_of_scores(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the given arguments that change the scores (those that are not None)."""
    return [name for name in _CHANGES_OF_SCORES if arguments.get(name) is not None]


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """Convert tensors to autocast's dtype; if autocast is off, return them unchanged.

    Args:
        tensors: all on one device.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) for tensor in tensors]


@cache
def bound_on_scores(softcap: float) -> Callable[..., Tensor]:
    """The soft cap `softcap * tanh(score / softcap)`, as flex_attention's `score_mod`."""

    def score_mod(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def beside_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Add sinks to an attention's output: one more score per head, whose value is 0.

    Args:
        output: (B, Q, A, F), the output without sinks.
        lse: (B, Q, A) float32, logarithm of the sum of the exponentials of the scores.
        sinks: (A,), the additional scores.

    Returns:
        (B, Q, A, F) in float32 or wider.
    """
    # The keys keep exp(lse) / (exp(lse) + exp(sink)) of the softmax's weight.
    return output * torch.sigmoid(lse - sinks.float())[..., None]


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scaling: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operators, on any device; scores and softmax are in float32.

    Query heads that share keys and values share one matrix product.

    Args:
        query: (B, A, Q, E).
        key, value: (B, H, C, E) and (B, H, C, F).
        bias: (B or 1, 1, Q or 1, C or 1), added to the scores.
        scaling: multiplies the scores.
        softcap: soft cap on the scores, applied before the bias is added.
        dropout: rate at which weights are dropped.

    Returns:
        (B, Q, A, F) in the dtype of the values and (B, Q, A) float32, the logarithm of the sum of
        the exponentials of the scores.
    """
    shared = (key.shape[1], query.shape[1] // key.shape[1])
    rows = query.unflatten(1, shared).flatten(2, 3)
    # A product in bfloat16 would round the scores to three digits before the exponential.
    scores = torch.matmul(rows.float(), key.transpose(2, 3).float()) * scaling
    scores = scores.unflatten(2, (shared[1], -1))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias[:, :, None]
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None]).to(value.dtype)
    if dropout > 0.0:
        weights = nn.functional.dropout(weights, dropout)
    output = torch.matmul(weights.flatten(2, 3), value).unflatten(2, (shared[1], -1))
    return output.flatten(1, 2).transpose(1, 2), lse.flatten(1, 2).transpose(1, 2)
