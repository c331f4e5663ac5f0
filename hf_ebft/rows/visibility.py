"""Which tokens of a packed row see which: the one definition from which every mask is made.

Dimension letters: B rows of the batch, S document tokens, Q and C queries and keys (any subset of
the row).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hf_ebft.rows.documents import Documents


@dataclass(frozen=True)
class Coordinates:
    """The numbers of each token that decide visibility, for tokens in any order.

    All fields are (B, Q) int64.

    Attributes:
        slot: index in the packed row; unique within a row.
        document: which document of the row; -1 for padding and for rollouts that do not exist.
        position: position id within the document.
        rollout: 0 for document tokens; for rollout tokens, 1 + the index of their (block, sample).
        prefix_end: how many tokens of its document the token sees: position + 1 for a document
            token, e_k for a rollout token.
    """

    slot: Tensor
    document: Tensor
    position: Tensor
    rollout: Tensor
    prefix_end: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Coordinates:
        """The coordinates with `function` applied to each field."""
        return Coordinates(*(function(field) for field in self._fields()))

    def select(self, index: Tensor) -> Coordinates:
        """Coordinates of the tokens at `index` (Q,)."""
        return self.map(lambda field: field[:, index])

    def followed_by(self, other: Coordinates) -> Coordinates:
        """These tokens, then those of `other`."""
        pairs = zip(self._fields(), other._fields(), strict=True)
        return Coordinates(*(torch.cat(pair, dim=1) for pair in pairs))

    def _fields(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


def document_coordinates(documents: Documents) -> Coordinates:
    """Coordinates of the S document tokens of each row."""
    rows, width = documents.input_ids.shape
    return Coordinates(
        slot=torch.arange(width, device=documents.input_ids.device).expand(rows, -1),
        document=documents.document,
        position=documents.position,
        rollout=torch.zeros_like(documents.position),
        prefix_end=documents.position + 1,
    )


def sees(query: Coordinates, key: Coordinates) -> Tensor:
    """Whether each query sees each key, elementwise over broadcastable coordinates.

    A document token sees its document up to and including itself. A rollout token sees the first
    `e_k` tokens of its document, and its own rollout up to and including itself. Every token sees
    itself, padding included, so that no softmax is over an empty set.
    """
    in_prefix = (key.rollout == 0) & (key.position < query.prefix_end)
    in_own_rollout = (
        (key.rollout > 0) & (key.rollout == query.rollout) & (key.position <= query.position)
    )
    same_document = (key.document == query.document) & (key.document >= 0)
    return (same_document & (in_prefix | in_own_rollout)) | (key.slot == query.slot)
