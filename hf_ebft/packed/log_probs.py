"""Log-probabilities of the rollouts of a batch, and of its documents, in one forward pass."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from transformers import DynamicCache

from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.packed.targets import Targets, TokenLogProbs
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout, PackedPart


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
    """Log-probabilities from one forward pass over the packed row, with gradient if it is enabled.

    Args:
        model: the (wrapped) policy, or a reference model.
        forward: how the model runs packed rows.
        rollouts: the batch and its sampled tokens.
        temperature, with_document, chunk_size: see `Targets`.
        part: the part of the row to feed; default: all tokens that predict something.
        cache: keys and values of the tokens that the part may see but does not feed; it is extended
            in place.
    """
    part = rollouts.layout.predicting_part if part is None else part
    targets = Targets(part, temperature, with_document, chunk_size, forward.compiler)
    score = partial(targets.score, rollouts.tokens)
    results = forward.through_head(
        model, rollouts.input_ids(part), part, targets.keep, score, cache=cache
    )
    return targets.join(results)


def document_log_probs(
    model: nn.Module, forward: PackedForward, documents: Documents, *, chunk_size: int
) -> Tensor:
    """Log-probabilities of the documents from a pass over them alone, with gradient if enabled.

    Args:
        model, forward, chunk_size: as in `packed_log_probs`.
        documents: the batch.

    Returns:
        (B, S) float32 at temperature 1; 0 for tokens that are not targets.
    """
    layout = PackedLayout.without_rollouts(documents)
    nothing = documents.input_ids.new_zeros(layout.rollout_shape)
    found = packed_log_probs(
        model,
        forward,
        Rollouts(nothing, layout.blocks.exists, layout),
        temperature=1.0,
        with_document=True,
        chunk_size=chunk_size,
        part=layout.document_part,
    )
    assert found.document is not None
    return found.document
