"""The packed row: documents and rollouts in one row, so that each prefix is computed only once.

A row is `[documents: S][block 0: sample 0, sample 1, ... n-1][block 1: ...]...`, where each sample
has G tokens. The samples of a block are adjacent because they share one prefix. Only this module
knows that order. Other modules ask it for shapes, position ids, predictors and visibility.

Dimension letters: B rows of the batch, S document tokens, K blocks, n samples, G rollout length, R
= S + K * n * G tokens of the packed row, Q and C queries and keys (any subset of the row).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_ebft.rows.anchors import Blocks, find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.visibility import Coordinates, document_coordinates


@dataclass(frozen=True)
class PackedLayout:
    """Where documents, blocks and rollouts are in the packed rows of a batch.

    Attributes:
        documents: the batch; S is its width.
        blocks: its blocks; K is their number.
        n_samples: n.
        length: G.
        cache: values computed from the layout, shared with its parts.
    """

    documents: Documents
    blocks: Blocks
    n_samples: int
    length: int
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def without_rollouts(cls, documents: Documents) -> PackedLayout:
        """A layout for passes over the documents alone: K = 1, and its block does not exist."""
        width = documents.input_ids.shape[1]  # after a prefix of this length no block fits
        blocks = find_blocks(documents, stride=1, context_length=width, generate_max_len=1)
        return cls(documents, blocks, n_samples=1, length=1)

    @property
    def on_host(self) -> PackedLayout:
        """The same layout in the host's memory, copied from the device once.

        Values that decide shapes are computed from it, so that no forward pass waits for the
        device.
        """
        if self.documents.input_ids.device.type == "cpu":
            return self
        if "on_host" not in self.cache:
            self.cache["on_host"] = self.to(torch.device("cpu"))
        found: PackedLayout = self.cache["on_host"]
        return found

    @property
    def document_width(self) -> int:
        """S."""
        return self.documents.input_ids.shape[1]

    @property
    def rollout_shape(self) -> tuple[int, int, int, int]:
        """(B, n, K, G), the shape of tensors with one entry per rollout token, outside the row."""
        rows, blocks = self.blocks.exists.shape
        return rows, self.n_samples, blocks, self.length

    @property
    def row_width(self) -> int:
        """R."""
        _, samples, blocks, length = self.rollout_shape
        return self.document_width + blocks * samples * length

    def to_row(self, per_token: Tensor) -> Tensor:
        """(B, n, K, G) -> (B, K * n * G), the order of the row's rollout part."""
        return per_token.transpose(1, 2).flatten(1)

    def from_row(self, rollout_part: Tensor) -> Tensor:
        """(B, K * n * G, ...) -> (B, n, K, G, ...)."""
        _, samples, blocks, length = self.rollout_shape
        return rollout_part.unflatten(1, (blocks, samples, length)).transpose(1, 2)

    def input_ids(self, tokens: Tensor) -> Tensor:
        """(B, R) token ids of the packed row, with the rollouts `tokens` (B, n, K, G)."""
        self.check_tokens(tokens)
        return torch.cat([self.documents.input_ids, self.to_row(tokens)], dim=1)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise a ValueError unless `tokens` has the shape (B, n, K, G) and is int64."""
        if tuple(tokens.shape) != self.rollout_shape or tokens.dtype != torch.int64:
            raise ValueError(
                f"Rollout tokens have shape {tuple(tokens.shape)} and type {tokens.dtype}; this "
                f"batch needs (rows, samples, blocks, tokens) = {self.rollout_shape} of "
                "torch.int64."
            )

    @property
    def coordinates(self) -> Coordinates:
        """Coordinates (B, R) of all tokens of each row."""
        if "coordinates" not in self.cache:
            self.cache["coordinates"] = self._coordinates()
        found: Coordinates = self.cache["coordinates"]
        return found

    def _coordinates(self) -> Coordinates:
        rows, samples, blocks, length = self.rollout_shape
        device = self.documents.input_ids.device
        steps = torch.arange(length, device=device)
        exists = self.blocks.exists[:, None, :, None].expand(self.rollout_shape)
        anchor = self.blocks.position[:, None, :, None].expand(self.rollout_shape)
        owner = self.blocks.document[:, None, :, None].expand(self.rollout_shape)
        own_rollout = torch.arange(1, blocks * samples + 1, device=device)
        rollouts = Coordinates(
            slot=torch.arange(self.document_width, self.row_width, device=device).expand(rows, -1),
            document=self.to_row(owner),
            position=self.to_row((anchor + steps) * exists),
            rollout=own_rollout.repeat_interleave(length).expand(rows, -1),
            prefix_end=self.to_row(anchor),
        )
        return document_coordinates(self.documents).followed_by(rollouts)

    @cached_property
    def predictor(self) -> Tensor:
        """(B, n, K, G) int64: the index in the row whose logits predict each rollout token.

        The last token of the prefix predicts the first token of a rollout. Each token of the
        rollout predicts the next one.
        """
        place = self.from_row(self.coordinates.slot[:, self.document_width :])
        predictor = place - 1
        predictor[..., 0] = (self.blocks.column - 1).clamp(min=0)[:, None, :]
        return predictor

    @cached_property
    def window(self) -> Tensor:
        """(B, K, G) int64: indices in the row of each block's ground-truth window.

        0 if the block does not exist.
        """
        steps = torch.arange(self.length, device=self.blocks.column.device)
        return (self.blocks.column[:, :, None] + steps) * self.blocks.exists[:, :, None]

    def step_slots(self, step: int) -> Tensor:
        """(K * n,) int64: index in the row of the `step`-th token of each rollout, ascending."""
        device = self.documents.input_ids.device
        return torch.arange(self.document_width + step, self.row_width, self.length, device=device)

    @cached_property
    def document_part(self) -> PackedPart:
        """The documents alone, without rollouts."""
        return self._part(document_coordinates(self.documents), True, range(0), range(0))

    @cached_property
    def row_part(self) -> PackedPart:
        """The whole row."""
        steps = range(self.length)
        return self._part(self.coordinates, True, steps, steps)

    @cached_property
    def predicting_part(self) -> PackedPart:
        """The row without the last token of every rollout, which predicts nothing."""
        steps = range(self.length - 1)
        return self._part(self.coordinates.select(self._slots(steps)), True, steps, steps)

    @cached_property
    def rollouts_part(self) -> PackedPart:
        """The rollouts; a cache holds the documents."""
        return self._without_documents(self.row_part)

    @cached_property
    def predicting_rollouts_part(self) -> PackedPart:
        """The rollouts without their last tokens; a cache holds the documents."""
        return self._without_documents(self.predicting_part)

    def _without_documents(self, part: PackedPart) -> PackedPart:
        queries = part.queries.map(lambda field: field[:, self.document_width :])
        return self._part(queries, False, part.steps, part.own_steps)

    def step_part(self, step: int) -> PackedPart:
        """The `step`-th token of every rollout; a cache holds the documents and earlier steps."""
        queries = self.coordinates.select(self.step_slots(step))
        part = self._part(queries, False, range(step, step + 1), range(step + 1))
        return replace(part, decodes=True)

    def _slots(self, steps: range) -> Tensor:
        """Indices in the row of the documents and of the first `len(steps)` tokens of each rollout.

        They are ascending.
        """
        place = torch.arange(self.row_width, device=self.documents.input_ids.device)
        own = place[self.document_width :].view(-1, self.length)[:, : len(steps)]
        return torch.cat([place[: self.document_width], own.flatten()])

    def _part(
        self, queries: Coordinates, has_documents: bool, steps: range, own_steps: range
    ) -> PackedPart:
        # The part gets a copy of the layout. If a layout and its parts referred to each other, only
        # Python's cyclic garbage collector would free them and their masks, some steps later.
        return PackedPart(replace(self), queries, has_documents, steps, own_steps)

    def select_blocks(self, chunk: slice) -> PackedLayout:
        """The same documents with some of their blocks.

        Args:
            chunk: slice of the K blocks. If it ends beyond the last block, the result is padded
                with blocks that do not exist.
        """
        blocks = self.blocks[chunk]
        missing = beyond(chunk, self.blocks.exists.shape[1])
        if missing > 0:
            blocks = blocks.filled_up(missing)
        selected = PackedLayout(self.documents, blocks, self.n_samples, self.length)
        if self.on_host is not self:
            selected.cache["on_host"] = self.on_host.select_blocks(chunk)
        return selected

    def to(self, device: torch.device) -> PackedLayout:
        """The same layout on a device. If it is there already, itself with its cache."""
        if self.documents.input_ids.device == device:
            return self
        if device.type == "cpu" and "on_host" in self.cache:
            copied: PackedLayout = self.cache["on_host"]
            return copied
        moved = PackedLayout(
            self.documents.to(device), self.blocks.to(device), self.n_samples, self.length
        )
        if device.type != "cpu" and self.documents.input_ids.device.type == "cpu":
            moved.cache["on_host"] = self
        return moved


@dataclass(frozen=True)
class PackedPart:
    """The tokens of the row that one forward pass feeds (queries), and those they may see (keys).

    Attributes:
        layout: layout of the row.
        queries: coordinates of the tokens that are fed.
        has_documents: whether the document tokens are fed. If so, they come first.
        steps: which tokens of every rollout are fed. A single step is ordered (block, sample);
            several are ordered (block, sample, step), as in the row.
        own_steps: which tokens of every rollout are among the keys. If all of them are fed in this
            pass, they are ordered as in the row; otherwise they are ordered (step, block, sample).
        decodes: whether it is a decoding step.
        masks: attention masks made for this part, kept so that two networks can share them.
    """

    layout: PackedLayout
    queries: Coordinates
    has_documents: bool
    steps: range
    own_steps: range
    decodes: bool = False
    masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_keys(self) -> int:
        """C."""
        _, samples, blocks, _ = self.layout.rollout_shape
        return self.layout.document_width + blocks * samples * len(self.own_steps)

    @property
    def step_major(self) -> bool:
        """Whether the rollouts' keys are ordered by step first, as in a cache that grows."""
        return self.steps != self.own_steps

    @cached_property
    def keys(self) -> Coordinates:
        """Coordinates (B, C) of the keys: the cached tokens, then the queries themselves.

        The S document tokens come first.
        """
        layout = self.layout
        if self.has_documents:  # nothing is cached
            return self.queries
        if not self.step_major:
            return layout.coordinates.select(layout._slots(self.own_steps))
        document = torch.arange(layout.document_width, device=self.queries.slot.device)
        own = [layout.step_slots(step) for step in self.own_steps]
        return layout.coordinates.select(torch.cat([document, *own]))

    @cached_property
    def index_of(self) -> Tensor:
        """(R,) int64: index in the row -> index among the queries (0 for tokens not fed)."""
        slot = self.queries.slot[0]
        index = torch.zeros(self.layout.row_width, dtype=torch.long, device=slot.device)
        index[slot] = torch.arange(slot.shape[0], device=slot.device)
        return index


def beyond(chunk: slice, n_blocks: int) -> int:
    """How many blocks of a chunk lie beyond the last of `n_blocks`."""
    return 0 if chunk.stop is None else max(0, chunk.stop - n_blocks)
