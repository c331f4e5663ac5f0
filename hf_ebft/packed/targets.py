"""Which tokens of a packed row predict which targets, and the targets' log-probabilities.

Log-probabilities are computed from one chunk of logits at a time.

Dimension letters: B rows of the batch, S document tokens, K blocks, n samples, G rollout length, R
packed row, P tokens whose states are kept, N rows of logits, t targets per row of logits, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_ebft.packed.compiled_layers import CompileOptions
from hf_ebft.packed.heads import ToLogits
from hf_ebft.packed.token_log_probs import (
    contexts_of_checkpoint,
    plain_token_log_probs,
    token_log_probs,
)
from hf_ebft.rows.documents import predicted_targets
from hf_ebft.rows.layout import PackedLayout, PackedPart
from hf_ebft.rows.sending import sent


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probabilities of the tokens of packed rows.

    Attributes:
        rollout: (B, n, K, G) float32, log p(token | prefix, own earlier tokens) at the temperature.
            If only a part of the row was fed, G is replaced by the number of tokens it predicts.
        document: (B, S) float32, log p(token | document before it) at temperature 1; 0 for tokens
            that are not targets. None if no cross-entropy was requested.
    """

    rollout: Tensor
    document: Tensor | None


@dataclass(frozen=True)
class KeptPlaces:
    """The indices in the row whose logits a training pass needs; the same for every row.

    Attributes:
        places: (P,) int64, ascending indices in the row; the first `n_document` are in the
            documents.
        n_document: number of indices in the documents.
        index_of: (R,) int64, index in the row -> index in `places`.
    """

    places: Tensor
    n_document: int
    index_of: Tensor

    @classmethod
    def for_layout(
        cls, layout: PackedLayout, *, whole_document: bool, part: PackedPart | None = None
    ) -> KeptPlaces:
        """The predictors of all rollout tokens, and of all document tokens if `whole_document`.

        Args:
            layout: layout of the row.
            whole_document: whether document tokens are also predicted.
            part: keep only predictors in this part of the row; default: the whole row.
        """
        # Computed by numpy on the host, which must know how many indices there are.
        document = inside = np.zeros(0, dtype=np.int64)
        if part is None or part.has_documents:
            document = np.unique(layout.on_host.predictor[..., 0].numpy())
            if whole_document:
                document = np.arange(max(1, layout.document_width - 1))
        if part is None or len(part.steps) > 0:
            rollouts = np.arange(layout.document_width, layout.row_width)
            inside = rollouts.reshape(-1, layout.length)[:, :-1].flatten()
        places = np.concatenate([document, inside])
        index_of = np.zeros(layout.row_width, dtype=np.int64)
        index_of[places] = np.arange(len(places))
        device = layout.documents.input_ids.device
        return cls(
            places=sent(places, device),
            n_document=len(document),
            index_of=sent(index_of, device),
        )


@dataclass(frozen=True)
class Targets:
    """The tokens that a part of the row predicts, and how to compute their log-probabilities.

    Attributes:
        part: the part of the row. The documents alone predict the first token of every rollout; the
            rollouts alone predict the other tokens.
        temperature: sampling temperature.
        with_document: whether document tokens are also targets.
        chunk_size: rows of logits that exist at once.
        compiler: options with which the computation of a chunk is compiled; None: not compiled.
        with_gradient: whether the pass over the documents in sampling has a gradient.
    """

    part: PackedPart
    temperature: float
    with_document: bool
    chunk_size: int
    compiler: CompileOptions | None = None
    with_gradient: bool = True

    @cached_property
    def kept(self) -> KeptPlaces:
        """The tokens whose states are needed."""
        return KeptPlaces.for_layout(
            self.part.layout, whole_document=self._scores_document, part=self.part
        )

    @cached_property
    def keep(self) -> Tensor:
        """(P,) int64, indices of the kept tokens among the part's tokens."""
        return self.part.index_of[self.kept.places]

    @property
    def _scores_document(self) -> bool:
        return self.with_document and self.part.has_documents

    def score(self, tokens: Tensor, states: Tensor, to_logits: ToLogits) -> list[Tensor]:
        """Log-probabilities of the targets, one tensor per kind of target; `join` combines them.

        Args:
            tokens: (B, n, K, G), tokens of the rollouts. If the part is the documents alone, only
                the first token of each rollout is read.
            states: (B, P, X), one per kept token.
            to_logits: computes logits from any of the states.
        """
        layout = self.part.layout
        documents, predictor = layout.documents, layout.predictor
        row = torch.arange(states.shape[0], device=states.device) * states.shape[1]

        def log_probs_at(place: Tensor, targets: Tensor, temperature: float) -> Tensor:
            index = self.kept.index_of[place] + row.view(-1, *[1] * (place.dim() - 1))
            found = target_log_probs(
                states.flatten(0, 1),
                index.flatten(),
                targets.flatten(0, place.dim() - 1),
                to_logits,
                temperature=temperature,
                chunk_size=self.chunk_size,
                compiler=self.compiler,
            )
            return found.view(targets.shape)

        results = []
        if self.part.has_documents:
            # The first tokens of a block's n samples are drawn from one distribution.
            starts = log_probs_at(
                predictor[:, 0, :, 0], tokens[..., 0].transpose(1, 2), self.temperature
            )
            results.append(starts.transpose(1, 2)[..., None])
        if len(self.part.steps) > 0:
            later = log_probs_at(predictor[..., 1:], tokens[..., 1:, None], self.temperature)
            results.append(later[..., 0])
        if self._scores_document:
            place = torch.arange(layout.document_width - 1, device=row.device)
            place = place.expand(row.shape[0], -1)
            results.append(log_probs_at(place, documents.input_ids[:, 1:, None], 1.0)[..., 0])
        return results

    def join(self, results: Sequence[Tensor]) -> TokenLogProbs:
        """Combine the results of `score` into one log-probability per token."""
        if not self._scores_document:
            return TokenLogProbs(rollout=torch.cat(list(results), dim=-1), document=None)
        *of_rollouts, of_document = results
        is_target = predicted_targets(self.part.layout.documents)
        document = torch.where(is_target, nn.functional.pad(of_document, (1, 0)), 0.0)
        return TokenLogProbs(rollout=torch.cat(of_rollouts, dim=-1), document=document)


def target_log_probs(
    states: Tensor,
    index: Tensor,
    targets: Tensor,
    to_logits: ToLogits,
    *,
    temperature: float,
    chunk_size: int,
    compiler: CompileOptions | None = None,
) -> Tensor:
    """Log-probabilities of target tokens, (N, t) float32.

    Only one chunk of logits exists at a time. The backward pass recomputes each chunk.

    Args:
        states: (M, H).
        index: (N,) int64, the state that predicts each row's targets.
        targets: (N, t) int64.
        to_logits: (N, H) -> (N, V).
        temperature: divides the logits.
        chunk_size: rows of a chunk.
        compiler: options with which the computation of a chunk is compiled. The last chunk is then
            padded, so that all chunks have one shape. None: not compiled.
    """
    log_probs: Callable[..., Tensor] = _log_probs
    n_rows = len(index)
    if compiler is not None:
        log_probs = _compiled_log_probs(compiler)
        missing = -n_rows % chunk_size
        index, targets = (
            nn.functional.pad(rows, (0,) * (2 * rows.dim() - 1) + (missing,))
            for rows in (index, targets)
        )

    def chunk_log_probs(states: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        return log_probs(states.index_select(0, index), targets, to_logits, temperature)

    chunks = list(zip(index.split(chunk_size), targets.split(chunk_size), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        found = [chunk_log_probs(states, *chunk) for chunk in chunks]
    else:
        # Checkpointing restores the random state: a head with adapters may use dropout, whose mask
        # must be the same in the recomputation.
        found = [
            checkpoint(
                chunk_log_probs,
                states,
                *chunk,
                use_reentrant=False,
                context_fn=contexts_of_checkpoint,
            )
            for chunk in chunks
        ]
    return torch.cat(found)[:n_rows]


def _log_probs(states: Tensor, targets: Tensor, to_logits: ToLogits, temperature: float) -> Tensor:
    """Log-probabilities (c, t) float32 of the targets of a chunk's states (c, H)."""
    return token_log_probs(to_logits(states), targets, temperature)


def _plain_log_probs(
    states: Tensor, targets: Tensor, to_logits: ToLogits, temperature: float
) -> Tensor:
    """`_log_probs` for a compiler, whose fused kernels are better than `token_log_probs`."""
    return plain_token_log_probs(to_logits(states), targets, temperature)


@cache
def _compiled_log_probs(compiler: CompileOptions) -> Callable[..., Tensor]:
    """The compiled function, one per process and options."""
    return compiler.compile(_plain_log_probs)
