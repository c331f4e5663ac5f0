"""Whole rollouts by brute force: every continuation of a prefix and its exact probability.

Dimension letters: P tokens of a prefix, G of a rollout, V vocabulary, C = V ** G continuations.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def tiny_model(
    config_class: Callable[..., PreTrainedConfig],
    vocabulary: int,
    *,
    seed: int,
    spread: float,
    **settings: Any,
) -> PreTrainedModel:
    """A random model in evaluation mode whose predictions depend strongly on the whole prefix.

    Args:
        config_class: of an architecture that uses the names of Llama's configuration.
        vocabulary: V.
        seed: of the weights; torch's global generator is left as it is.
        spread: standard deviation of the weights. With transformers' 0.02 every distribution would
            be all but uniform, and a wrong one hard to tell from the right one.
        settings: of the configuration.
    """
    defaults: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = config_class(vocab_size=vocabulary, initializer_range=spread, **(defaults | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


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
    """(C,) probability of each continuation of ``prefix`` at ``temperature``."""
    logits = continuation_logits(model, prefix, continuations)
    per_token = (logits / temperature).softmax(dim=-1)
    return per_token.gather(-1, continuations[..., None]).squeeze(-1).prod(dim=-1)
