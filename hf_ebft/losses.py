"""From logits to the objective: log-probabilities in chunks, policy gradient, cross-entropy, KL.

Batch loss = mean over documents of ``rl_coef * L_rl + ce_coef * L_ce + kl_coef * L_kl``, each a
mean over the document's own tokens, so that a document weighs the same however many blocks it has.

Dimension letters: B rows, S document tokens, K blocks, n samples, G rollout length, R packed row,
P places whose logits are kept, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_ebft.documents import Documents
from hf_ebft.layout import PackedLayout
from hf_ebft.policy import PackedForward
from hf_ebft.rollouts import Rollouts


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probabilities of one packed row.

    Attributes:
        rollout: (B, n, K, G) float32, log p(token | prefix, own earlier tokens) at the temperature.
        document: (B, S) float32, log p(token | document before it) at temperature 1; 0 for tokens
            that are no target. None where no cross-entropy is wanted.
    """

    rollout: Tensor
    document: Tensor | None


@dataclass(frozen=True)
class KeptPlaces:
    """The places of the row whose logits a training pass needs, the same for every row.

    Attributes:
        places: (P,) int64, ascending; the first ``n_document`` lie in the document.
        n_document: how many.
        index_of: (R,) int64, place of the row -> index into ``places``.
    """

    places: Tensor
    n_document: int
    index_of: Tensor

    @classmethod
    def of(cls, layout: PackedLayout, *, whole_document: bool) -> KeptPlaces:
        """Predictors of all rollout tokens, and of all document tokens if ``whole_document``."""
        device = layout.predictor.device
        if whole_document:
            document = torch.arange(max(1, layout.document_width - 1), device=device)
        else:
            document = torch.unique(layout.predictor[..., 0])
        inside = layout.predictor[0, :, :, 1:].flatten()
        places = torch.cat([document, torch.unique(inside)])
        index_of = torch.zeros(layout.row_width, dtype=torch.long, device=device)
        index_of[places] = torch.arange(places.shape[0], device=device)
        return cls(places=places, n_document=document.shape[0], index_of=index_of)


def token_log_probs(
    logits: Tensor,
    kept: KeptPlaces,
    rollouts: Rollouts,
    *,
    temperature: float,
    with_document: bool,
    chunk_size: int,
) -> TokenLogProbs:
    """Log-probabilities of the rollout tokens, and of the document's targets if wanted.

    Args:
        logits: (B, P, V) at ``kept.places``.
        kept: which places these are.
        rollouts: the batch and its sampled tokens.
        temperature: of the sampling.
        with_document: whether the document's log-probabilities are wanted.
        chunk_size: rows of logits that exist in float32 at once.
    """
    layout = rollouts.layout
    rows = torch.arange(logits.shape[0], device=logits.device)
    normalizer = log_normalizer(logits, temperature, chunk_size)
    index = kept.index_of[layout.predictor]
    row = rows[:, None, None, None]
    rollout = logits[row, index, rollouts.tokens].float() / temperature - normalizer[row, index]
    if not with_document:
        return TokenLogProbs(rollout=rollout, document=None)

    document_logits = logits[:, : kept.n_document]
    if temperature != 1.0:
        normalizer = log_normalizer(document_logits, 1.0, chunk_size)
    targets = layout.documents.input_ids[:, 1:]
    width = targets.shape[1]
    row, index = rows[:, None], torch.arange(width, device=logits.device)
    document = document_logits[row, index, targets].float() - normalizer[:, :width]
    document = nn.functional.pad(document, (1, 0))
    return TokenLogProbs(
        rollout=rollout,
        document=torch.where(predicted_targets(layout.documents), document, 0.0),
    )


def log_normalizer(logits: Tensor, temperature: float, chunk_size: int) -> Tensor:
    """logsumexp(logits / temperature) in float32, (B, P, V) -> (B, P).

    One chunk of rows is turned into float32 at a time, in the backward pass too.
    """

    def chunk_normalizer(chunk: Tensor) -> Tensor:
        return torch.logsumexp(chunk.float() / temperature, dim=-1)

    chunks = logits.flatten(0, 1).split(chunk_size)
    normalizers = [
        checkpoint(chunk_normalizer, chunk, use_reentrant=False, preserve_rng_state=False)
        if chunk.requires_grad
        else chunk_normalizer(chunk)
        for chunk in chunks
    ]
    return torch.cat(normalizers).view(logits.shape[:2])


def policy_log_probs(
    model: nn.Module,
    forward: PackedForward,
    rollouts: Rollouts,
    kept: KeptPlaces,
    *,
    temperature: float,
    with_document: bool,
    chunk_size: int,
) -> TokenLogProbs:
    """The training pass: one forward of the wrapped policy over the packed row, with gradient."""
    coordinates = rollouts.layout.coordinates
    logits = forward.logits(
        model, rollouts.layout.input_ids(rollouts.tokens), coordinates, kept.places
    )
    return token_log_probs(
        logits,
        kept,
        rollouts,
        temperature=temperature,
        with_document=with_document,
        chunk_size=chunk_size,
    )


def predicted_targets(documents: Documents) -> Tensor:
    """(B, S) bool: labelled tokens that have a predecessor in their document."""
    return documents.is_target & (documents.position > 0)


def per_rollout_token_mean(values: Tensor, layout: PackedLayout) -> Tensor:
    """Mean over each document's rollout tokens, then over the batch's documents.

    Args:
        values: (B, n, K, G).

    Returns:
        A scalar; documents without blocks count as zero.
    """
    blocks = layout.blocks
    per_block = torch.where(blocks.exists, values.mean(dim=(1, 3)), 0.0)
    return (per_block / blocks.per_document().clamp(min=1)).sum() / layout.documents.count


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor, layout: PackedLayout) -> Tensor:
    """REINFORCE: ``-mean(advantage * log p(token))`` per document, averaged over documents.

    Its gradient is the policy gradient of the expected reward; its value means nothing.

    Args:
        log_probs: (B, n, K, G), with gradient.
        advantages: (B, n, K), constants.
    """
    return per_rollout_token_mean(-advantages.detach()[..., None] * log_probs, layout)


def cross_entropy(document_log_probs: Tensor, documents: Documents) -> Tensor:
    """Mean of ``-log p`` over each document's targets, then over the batch's documents.

    Args:
        document_log_probs: (B, S), zero where a token is no target.
    """
    slot = documents.document.clamp(min=0)
    targets = predicted_targets(documents)
    empty = torch.zeros_like(document_log_probs)
    per_document = empty.scatter_add(1, slot, torch.where(targets, -document_log_probs, 0.0))
    counts = empty.scatter_add(1, slot, targets.to(empty.dtype))
    return (per_document / counts.clamp(min=1)).sum() / documents.count


def kl_penalty(log_probs: Tensor, reference_log_probs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With r = log p_ref - log p: k1 = -r, k2 = r^2 / 2, k3 = exp(r) - 1 - r (J. Schulman,
    "Approximating KL divergence", 2020). The value is the estimator's. The gradient of k1's value
    has mean zero, so k1 carries the score-function gradient ``-r * grad log p`` instead, which is
    unbiased for the KL of the token's distribution (as is that of k2; that of k3 is not).

    Args:
        log_probs: (B, n, K, G), with gradient.
        reference_log_probs: (B, n, K, G).
    """
    log_ratio = reference_log_probs - log_probs
    if estimator == "k1":
        value = -log_ratio.detach()
        return value + value * (log_probs - log_probs.detach())
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.exp() - 1 - log_ratio
    raise ValueError(f"kl_estimator={estimator!r} is unknown; choose one of k1, k2, k3.")
