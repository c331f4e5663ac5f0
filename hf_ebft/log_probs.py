"""Log-probabilities of the tokens of a packed row, a chunk of logits at a time.

Dimension letters: B rows, S document tokens, K blocks, n samples, G rollout length, R packed row,
P places whose states are kept, N rows of logits, t targets of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from hf_ebft.documents import Documents
from hf_ebft.heads import ToLogits
from hf_ebft.layout import PackedLayout, PackedPart
from hf_ebft.policy import PackedForward
from hf_ebft.rollouts import Rollouts


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probabilities of one packed row.

    Attributes:
        rollout: (B, n, K, G) float32, log p(token | prefix, own earlier tokens) at the temperature.
            Of a part of the row: of the tokens that it predicts.
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
    def of(
        cls, layout: PackedLayout, *, whole_document: bool, part: PackedPart | None = None
    ) -> KeptPlaces:
        """Predictors of all rollout tokens, and of all document tokens if ``whole_document``.

        Args:
            layout: of the row.
            whole_document: whether document tokens are predicted, too.
            part: keep only those that are in this part of the row; default: all.
        """
        device = layout.predictor.device
        document = inside = torch.zeros(0, dtype=torch.long, device=device)
        if part is None or part.has_documents:
            document = torch.unique(layout.predictor[..., 0])
            if whole_document:
                document = torch.arange(max(1, layout.document_width - 1), device=device)
        if part is None or len(part.steps) > 0:
            inside = torch.unique(layout.predictor[0, :, :, 1:])
        places = torch.cat([document, inside])
        index_of = torch.zeros(layout.row_width, dtype=torch.long, device=device)
        index_of[places] = torch.arange(places.shape[0], device=device)
        return cls(places=places, n_document=document.shape[0], index_of=index_of)


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
        temperature: of the sampling.
        with_document: whether the document's log-probabilities are wanted.
        chunk_size: rows of logits that exist at once.
        part: what to feed of the row; default: all that predicts something. The documents alone
            predict the first token of every rollout, the rollouts alone the others.
        cache: keys and values of what the part may look at and does not feed, extended in place.
    """
    layout = rollouts.layout
    part = layout.predicting_part if part is None else part
    with_document = with_document and part.has_documents
    kept = KeptPlaces.of(layout, whole_document=with_document, part=part)
    shape = layout.rollout_shape
    first, later = layout.predictor[:, 0, :, :1], layout.predictor[..., 1:]
    documents = layout.documents
    document = torch.arange(layout.document_width - 1, device=first.device)

    def log_probs(states: Tensor, to_logits: ToLogits) -> list[Tensor]:
        row = torch.arange(states.shape[0], device=states.device) * states.shape[1]

        def of(place: Tensor, targets: Tensor, temperature: float) -> Tensor:
            index = kept.index_of[place] + row.view(-1, *[1] * (place.dim() - 1))
            found = target_log_probs(
                states.flatten(0, 1),
                index.flatten(),
                targets.flatten(0, place.dim() - 1),
                to_logits,
                temperature=temperature,
                chunk_size=chunk_size,
            )
            return found.view(targets.shape)

        results = []
        if part.has_documents:
            # The n samples of a block start from one distribution.
            starts = of(first[..., 0], rollouts.tokens[..., 0].transpose(1, 2), temperature)
            results.append(starts.transpose(1, 2)[..., None])
        if len(part.steps) > 0 and shape[3] > 1:
            results.append(of(later, rollouts.tokens[..., 1:, None], temperature)[..., 0])
        if with_document:
            places = document.expand(shape[0], -1)
            results.append(of(places, documents.input_ids[:, 1:, None], 1.0)[..., 0])
        return results

    input_ids = layout.input_ids(rollouts.tokens)[:, part.queries.slot[0]]
    keep = part.index_of[kept.places]
    results = forward.through_head(model, input_ids, part, keep, log_probs, cache=cache)
    document_log_probs = None
    if with_document:
        of_targets = nn.functional.pad(results.pop(), (1, 0))
        document_log_probs = torch.where(predicted_targets(documents), of_targets, 0.0)
    return TokenLogProbs(rollout=torch.cat(results, dim=-1), document=document_log_probs)


def target_log_probs(
    states: Tensor,
    index: Tensor,
    targets: Tensor,
    to_logits: ToLogits,
    *,
    temperature: float,
    chunk_size: int,
) -> Tensor:
    """Log-probabilities of target tokens, (N, t) float32.

    One chunk of logits exists at a time, in the backward pass too, which makes them again.

    Args:
        states: (M, H).
        index: (N,) int64, the state that predicts each row's targets.
        targets: (N, t) int64.
        to_logits: (N, H) -> (N, V).
        temperature: divides the logits.
        chunk_size: rows of a chunk.
    """

    def chunk_log_probs(states: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        logits = to_logits(states.index_select(0, index)).float()
        if temperature != 1.0:
            logits = logits / temperature
        return logits.log_softmax(dim=-1).gather(1, targets)

    chunks = list(zip(index.split(chunk_size), targets.split(chunk_size), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        found = [chunk_log_probs(states, *chunk) for chunk in chunks]
    else:
        # A head with adapters may hold dropout, whose mask must be the same the second time.
        found = [
            checkpoint(chunk_log_probs, states, *chunk, use_reentrant=False) for chunk in chunks
        ]
    return torch.cat(found)


def predicted_targets(documents: Documents) -> Tensor:
    """(B, S) bool: labelled tokens that have a predecessor in their document."""
    return documents.is_target & (documents.position > 0)
