"""Whole rollouts by brute force: every continuation of a prefix and its exact probability.

Dimension letters: P tokens of a prefix, G of a rollout, V vocabulary, C = V ** G continuations.
"""

import itertools

import torch
from torch import Tensor
from transformers import PreTrainedModel


def all_continuations(vocabulary: int, length: int) -> Tensor:
    """(C, G) int64 in lexicographic order: row c is c written in base V."""
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))


def continuation_logits(model: PreTrainedModel, prefix: Tensor, continuations: Tensor) -> Tensor:
    """(C, G, V) logits that predict each token of each continuation, from plain causal forwards.

    Args:
        model: any causal language model.
        prefix: (P,), P >= 1.
        continuations: (C, G).
    """
    texts = torch.cat([prefix.expand(len(continuations), -1), continuations], dim=1)
    return model(input_ids=texts, use_cache=False).logits[:, len(prefix) - 1 : -1]


def continuation_probabilities(
    model: PreTrainedModel, prefix: Tensor, continuations: Tensor, temperature: float
) -> Tensor:
    """(C,) probability of each continuation of `prefix` at `temperature`."""
    logits = continuation_logits(model, prefix, continuations)
    per_token = (logits / temperature).softmax(dim=-1)
    return per_token.gather(-1, continuations[..., None]).squeeze(-1).prod(dim=-1)
