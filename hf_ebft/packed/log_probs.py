"""Log-probabilities of the rollouts of a batch, and of its documents, in one forward pass."""

from __future__ import annotations

from functools import partial

from torch import nn
from transformers import DynamicCache

from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.packed.targets import Targets, TokenLogProbs
from hf_ebft.rows.layout import PackedPart


def packed_log_probs(
    model: nn.Module,
    forward: PackedForward,
    rollouts: Rollouts,
    *,
    temperature: float,
    with_document: bool,
    chunk_size: int,
    part: PackedPart | None = None,
    cache: DynamicCache | None = None,
) -> TokenLogProbs:
    """One forward pass of a model over the packed row, with gradient if it is on.

    Args:
        model: the (wrapped) policy, or a reference model.
        forward: how it runs packed rows.
        rollouts: the batch and its sampled tokens.
        temperature, with_document, chunk_size: see `Targets`.
        part: what to feed of the row; default: all that predicts something.
        cache: keys and values of what the part may look at and does not feed, extended in place.
    """
    part = rollouts.layout.predicting_part if part is None else part
    targets = Targets(part, temperature, with_document, chunk_size, forward.compiler)
    score = partial(targets.score, rollouts.tokens)
    results = forward.through_head(
        model, rollouts.input_ids(part), part, targets.keep, score, cache=cache
    )
    return targets.join(results)
