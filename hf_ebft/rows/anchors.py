"""Where blocks start: anchors, prefixes and ground-truth windows.

Block k of a document continues the prefix `doc[:e_k]` with `e_k = a_0 + k * stride`. Its ground
truth is the window `doc[e_k : e_k + G]`. The first prefix ends at `a_0 = context_length`. In a
document with a marked completion it ends at
`a_0 = max(context_length, completion_start + min_completion_prefix)`.

Dimension letters: B rows, S tokens of a row, K blocks (the maximum over the rows), G tokens of a
rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hf_ebft.config import StridedArguments
from hf_ebft.rows.buckets import EXACT, Buckets
from hf_ebft.rows.documents import Documents


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch, in the order of their anchors; K is at least 1.

    A row with fewer than K blocks is padded with blocks whose `exists` is False. A batch without
    any block still has K = 1, with `exists` False: every process of a distributed run must make
    the same forward passes, whatever its documents are.

    Attributes:
        column: (B, K) int64, index in the row of the window's first token; 0 if the block does not
            exist.
        position: (B, K) int64, e_k: index of that token within its document, which is the length of
            the prefix.
        document: (B, K) int64, which document of the row the block belongs to; -1 if the block does
            not exist.
        exists: (B, K) bool.
        weight: (B, K) float32, weight of each block after `thinned`: one over the probability with
            which it was kept. None: no blocks were dropped, and each has weight 1.
        total: (B, K) int64, `per_document` before `thinned` dropped blocks. None: no blocks were
            dropped.
        everything: the blocks before `thinned` dropped some. None: no blocks were dropped.
    """

    column: Tensor
    position: Tensor
    document: Tensor
    exists: Tensor
    weight: Tensor | None = None
    total: Tensor | None = None
    everything: Blocks | None = None

    def __getitem__(self, index: slice) -> Blocks:
        """A slice of the K blocks of every row."""
        return self._map(lambda tensor: tensor[:, index])

    def filled_up(self, missing: int) -> Blocks:
        """The same blocks, padded with `missing` blocks that do not exist."""
        nothing = {"document": -1}
        filled: dict[str, Any] = {
            name: torch.nn.functional.pad(tensor, (0, missing), value=nothing.get(name, 0))
            for name, tensor in self._tensors().items()
        }
        return replace(self, **filled)

    def to(self, device: torch.device) -> Blocks:
        """The same blocks on a device."""
        everything = None if self.everything is None else self.everything.to(device)
        return replace(self._map(lambda tensor: tensor.to(device)), everything=everything)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Blocks:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self._tensors().items()}
        return replace(self, **changed)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensor attributes that are not None, (B, K) each, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def weights(self) -> Tensor:
        """(B, K) float32: weight of each block in sums over blocks; 0 if it does not exist."""
        return self.exists.float() if self.weight is None else self.weight

    @property
    def before_choice(self) -> Blocks:
        """All blocks of the batch, including those that `thinned` dropped."""
        return self if self.everything is None else self.everything

    def thinned(self, kept: Tensor, probability: Tensor, counts: Buckets = EXACT) -> Blocks:
        """Drop some blocks, and weight the others so that sums over blocks keep their expectation.

        Args:
            kept: (B, K) bool, which blocks to keep; drawn independently with `probability`.
            probability: (B, K), above 0 for every block.
            counts: the new K is rounded up to one of these.
        """
        order, exists = _at_the_front(kept & self.exists, counts)

        def chosen(values: Tensor, nothing: int) -> Tensor:
            return torch.where(exists, values.gather(1, order), nothing)

        return Blocks(
            column=chosen(self.column, 0),
            position=chosen(self.position, 0),
            document=chosen(self.document, -1),
            exists=exists,
            weight=chosen(1 / probability.clamp(min=1e-12), 0).float(),
            total=chosen(self.per_document(), 0),
            everything=self,
        )

    def per_document(self) -> Tensor:
        """(B, K) int64: number of blocks in the document of each block; 0 if it does not exist.

        Blocks that `thinned` dropped are counted.
        """
        if self.total is not None:
            return self.total
        same = self.document[:, :, None] == self.document[:, None, :]
        return (same & self.exists[:, None, :]).sum(dim=2) * self.exists


def find_blocks(
    documents: Documents,
    *,
    stride: int,
    context_length: int,
    generate_max_len: int,
    min_completion_prefix: int = 0,
    counts: Buckets = EXACT,
) -> Blocks:
    """Find every block whose window lies in one document and contains no masked label.

    Args:
        documents: the batch.
        stride: tokens between anchors.
        context_length: minimum number of tokens of a prefix.
        generate_max_len: G.
        min_completion_prefix: number of tokens of a marked completion before its first block.
        counts: K is rounded up to one of these.

    Returns:
        `floor((S - G - a_0) / stride) + 1` blocks for a document of S tokens (none if this is not
        positive), without those whose window contains a masked label.
    """
    marked = documents.completion_start >= 0
    a_0 = torch.where(
        marked,
        (documents.completion_start + min_completion_prefix).clamp(min=context_length),
        context_length,
    )
    on_lattice = (documents.position >= a_0) & ((documents.position - a_0) % stride == 0)
    fits = documents.position + generate_max_len <= documents.length
    targets = torch.nn.functional.pad(documents.is_target.long().cumsum(dim=1), (1, 0))
    width = targets.shape[1] - 1
    column = torch.arange(width, device=targets.device)
    end = (column + generate_max_len).clamp(max=width)
    unmasked = targets[:, end] - targets[:, column] == generate_max_len
    columns, exists = _at_the_front(on_lattice & fits & unmasked, counts)
    return Blocks(
        column=columns,
        position=torch.where(exists, documents.position.gather(1, columns), 0),
        document=torch.where(exists, documents.document.gather(1, columns), -1),
        exists=exists,
    )


def _at_the_front(chosen: Tensor, counts: Buckets) -> tuple[Tensor, Tensor]:
    """Indices of the True entries of each row, in order, and which of them exist: (B, K) each.

    Args:
        chosen: (B, any width) bool.
        counts: K is rounded up to one of these.
    """
    count = chosen.sum(dim=1)
    most = counts.round_up(max(1, int(count.max())))
    # After rounding up, K may exceed the width of the row.
    chosen = torch.nn.functional.pad(chosen, (0, max(0, most - chosen.shape[1])))
    # A stable sort moves the True entries to the front of each row and keeps their order.
    index = torch.argsort((~chosen).long(), dim=1, stable=True)[:, :most]
    exists = torch.arange(most, device=count.device) < count[:, None]
    return torch.where(exists, index, 0), exists


@dataclass(frozen=True)
class Replies:
    """How many replies of a batch contain a block.

    A reply is a contiguous run of labelled tokens in a document that marks a completion. The blocks
    of a document are `stride` tokens apart, counted from its first reply. A later reply is
    guaranteed a block only if it has at least `generate_max_len + stride - 1` tokens.

    Attributes:
        count: int64 scalar, number of replies.
        without_blocks: int64 scalar, number of replies that contain no block.
        too_short: int64 scalar, number of replies shorter than a rollout. They contain no block at
            any stride.
    """

    count: Tensor
    without_blocks: Tensor
    too_short: Tensor


def count_replies(documents: Documents, blocks: Blocks, generate_max_len: int) -> Replies:
    """Count the replies of a batch, and those without a block.

    Args:
        documents: the batch.
        blocks: all blocks of the batch.
        generate_max_len: G.
    """
    labelled = documents.is_target & (documents.completion_start > 0)
    before = torch.nn.functional.pad(labelled[:, :-1], (1, 0))
    first = labelled & (~before | (documents.position == 0))
    # (B, S): the number of the reply along the row, from 1 on; 0 for tokens outside replies.
    reply = torch.where(labelled, first.long().cumsum(dim=1), 0)
    nothing = torch.zeros(reply.shape[0], reply.shape[1] + 1, dtype=torch.long, device=reply.device)
    length = nothing.scatter_add(1, reply, torch.ones_like(reply))[:, 1:]
    reached = nothing.scatter_add(1, reply.gather(1, blocks.column), blocks.exists.long())[:, 1:]
    return Replies(
        count=first.sum(),
        without_blocks=((length > 0) & (reached == 0)).sum(),
        too_short=((length > 0) & (length < generate_max_len)).sum(),
    )


def find_blocks_for(settings: StridedArguments, documents: Documents, **changes: Any) -> Blocks:
    """Call `find_blocks` with the settings of a run.

    Args:
        settings: give the stride, the shortest prefix and the length of rollouts.
        documents: the batch.
        **changes: arguments of `find_blocks` that override the settings or add to them.
    """
    names = ("stride", "context_length", "generate_max_len", "min_completion_prefix")
    return find_blocks(documents, **({name: getattr(settings, name) for name in names} | changes))
