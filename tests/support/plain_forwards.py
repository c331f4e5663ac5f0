"""The oracle of the exactness tests: plain causal forward passes, by plain loops.

Nothing here knows the library's layout, anchors, masks or pooling: documents, anchors and
embeddings follow from their definitions, and a model only ever sees `prefix + own tokens`,
without a mask, without position ids and without a cache.

Dimension letters: B rows, n samples, K blocks, G rollout length, V vocabulary, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class PlainBlock:
    """A prefix and the G ground-truth tokens after it."""

    prefix: list[int]
    window: list[int]


@dataclass(frozen=True)
class PlainPass:
    """What a model says about `own` tokens after a prefix.

    Attributes:
        log_probs: (n, G, V) float32, the distribution that predicts each own token.
        hidden: per entry of `hidden_states`, (n, G, H) at the own tokens themselves.
    """

    log_probs: Tensor
    hidden: list[Tensor]


def plain_blocks(
    batch: Batch,
    *,
    stride: int,
    context_length: int,
    generate_max_len: int,
    min_completion_prefix: int = 0,
) -> list[list[PlainBlock]]:
    """The blocks of each row, in order.

    A document of S tokens has blocks at e_k = a_0 + k * stride while e_k + G <= S, less those whose
    window holds a masked label; a_0 is the context length, or the completion's own start if later.
    """
    rows = []
    for row in range(batch["input_ids"].shape[0]):
        blocks = []
        for tokens, labelled in _documents(batch, row):
            anchor = context_length
            if "labels" in batch and any(labelled):
                anchor = max(anchor, labelled.index(True) + min_completion_prefix)
            while anchor + generate_max_len <= len(tokens):
                end = anchor + generate_max_len
                if all(labelled[anchor:end]):
                    blocks.append(PlainBlock(tokens[:anchor], tokens[anchor:end]))
                anchor += stride
        rows.append(blocks)
    return rows


def _documents(batch: Batch, row: int) -> list[tuple[list[int], list[bool]]]:
    """Tokens and label marks of each document of a row, padding dropped."""
    documents: list[tuple[list[int], list[bool]]] = []
    last_id = None
    for column, token in enumerate(batch["input_ids"][row].tolist()):
        if "attention_mask" in batch and not batch["attention_mask"][row, column]:
            continue
        document_id = int(batch["document_ids"][row, column]) if "document_ids" in batch else 0
        if document_id != last_id:
            documents.append(([], []))
            last_id = document_id
        labelled = "labels" not in batch or int(batch["labels"][row, column]) != IGNORE_INDEX
        documents[-1][0].append(token)
        documents[-1][1].append(labelled)
    return documents


def plain_pass(model: nn.Module, prefix: list[int], own: Tensor, *, hidden: bool) -> PlainPass:
    """Forward passes over `prefix + own` tokens (n, G), with gradient if it is on."""
    before = torch.tensor(prefix).expand(own.shape[0], -1)
    text = torch.cat([before, own], dim=1)
    output = model(input_ids=text, use_cache=False, output_hidden_states=hidden)
    start = len(prefix)
    return PlainPass(
        log_probs=output.logits[:, start - 1 : -1].float().log_softmax(-1),
        hidden=[state[:, start:] for state in output.hidden_states] if hidden else [],
    )


def plain_log_probs(
    model: nn.Module, prefix: list[int], own: list[int], temperature: float
) -> Tensor:
    """(G,) float64: log-probability of each own token, with gradient if it is on."""
    was_training = model.training
    model.eval()
    logits = model(input_ids=torch.tensor([prefix + own]), use_cache=False).logits[0]
    model.train(was_training)
    scores = (logits[len(prefix) - 1 : -1].double() / temperature).log_softmax(-1)
    return scores.gather(-1, torch.tensor(own)[:, None])[:, 0]


def last_token_embedding(hidden: list[Tensor], layers: list[int]) -> Tensor:
    """(n, m * H): unit vector per layer of the last own token, side by side, divided by sqrt(m)."""
    units = []
    for layer in layers:
        state = hidden[layer][:, -1].float()
        units.append(state / state.norm(dim=-1, keepdim=True))
    return torch.cat(units, dim=-1) / len(layers) ** 0.5
