"""Attention over packed rows without a mask of the whole row.

Each token of a packed row sees one range of document columns, which is the same for all rollouts of
a block. A rollout token also sees the earlier tokens of its own rollout. So scores are computed
only against `[range of the document | own rollout]`, tile by tile, with one softmax over both. That
is about R * (S / 2 + G) pairs of query and key instead of R * R, in plain matrix products. The
backward pass recomputes the scores instead of keeping them (as in FlashAttention, Dao et al. 2022,
section 3.1). Query heads that share keys and values (grouped-query attention) share a matrix
product, so keys and values are not repeated.

Dimension letters: B rows of the batch, H heads of keys and values, r query heads per key head, Q
queries and C keys of the pass, S document tokens (the first S keys), E and F widths of a head
(keys, values). Within a section of the queries: g groups, the queries of a group see the same
columns; n rollouts in a group, T tokens of each, w = n * r * T rows of scores in a group, O own
keys of a rollout. Within a tile: c groups, P columns that at least one of them sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Approximate maximum of a tile's rows of scores per query head. It is large enough for an efficient
# matrix product, and small enough for the scores to fit a CPU's cache or a small part of a GPU's
# memory.
TILE_ROWS = {"cpu": 192, "cuda": 2048}
# A tile computes every column that at least one of its groups sees. With TILES tiles, about one
# part in TILES of this work is for pairs that are hidden. A tile with fewer than FEWEST_ROWS rows
# costs more than it saves.
TILES, FEWEST_ROWS = 16, 128


@dataclass(frozen=True)
class Stretches:
    """Which document columns each query sees: `low <= column < high`.

    Attributes:
        low: (B, g, T), for T tokens of each of g groups (T = 1 if all tokens see the same columns).
        high: (B, g).
        exists: (B, g) bool. For groups that do not exist, the bounds are arbitrary and the output
            is ignored.
    """

    low: Tensor
    high: Tensor
    exists: Tensor


@dataclass(frozen=True)
class Tile:
    """Groups that are computed together.

    Attributes:
        groups: slice of the section's groups.
        columns: the document columns that at least one of them sees.
        hidden: ranges within `columns` that not all of them see, each with a
            (B, 1, c, 1, T or 1, columns) bool tensor, True if a query does not see a column.
    """

    groups: slice
    columns: slice
    hidden: tuple[tuple[slice, Tensor], ...]

    @property
    def width(self) -> int:
        """P."""
        return self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Section:
    """Adjacent queries of one kind: either all document tokens or all rollout tokens of a pass.

    Attributes:
        queries: their slice of the pass's queries. They are ordered by group, and within a group by
            rollout.
        per_group: (n, T).
        tiles: together they cover every group once.
        n_own: O.
        own_hidden: (B or 1, 1, g or 1, 1, T, O) bool, own tokens that a rollout token does not see;
            None if it sees all of them.
    """

    queries: slice
    per_group: tuple[int, int]
    tiles: tuple[Tile, ...]
    n_own: int = 0
    own_hidden: Tensor | None = None

    @property
    def n_rollouts(self) -> int:
        """g * n."""
        return (self.queries.stop - self.queries.start) // self.per_group[1]


@dataclass(frozen=True)
class AttentionPlan:
    """Which keys each query sees in one forward pass.

    Attributes:
        sections: together they cover every query once.
        n_queries: Q.
        n_keys: C.
        document_width: S.
        step_major: whether the rollouts' keys are ordered by step first (as in a cache that grows)
            instead of by rollout first.
    """

    sections: tuple[Section, ...]
    n_queries: int
    n_keys: int
    document_width: int
    step_major: bool

    def own_keys(self, keys: Tensor, n_own: int) -> Tensor:
        """View of the own keys or values of all rollouts: (B, H, C, E) -> (B, H, g * n, O, E)."""
        own = keys[:, :, self.document_width :]
        if self.step_major:
            return own.unflatten(2, (n_own, -1)).transpose(2, 3)
        return own.unflatten(2, (-1, n_own))


def make_tiles(
    stretches: Stretches, on_host: Stretches, per_group: tuple[int, int]
) -> Iterator[Tile]:
    """Cut a section's groups into tiles.

    Args:
        stretches: the columns that the groups see.
        on_host: the same in the host's memory, from which shapes are computed.
        per_group: (n, T).
    """
    low, high = stretches.low, stretches.high
    n_groups = high.shape[1]
    n_queries = per_group[0] * per_group[1]
    rows = TILE_ROWS["cpu" if low.device.type == "cpu" else "cuda"]
    size = max(-(-n_groups // TILES), FEWEST_ROWS // n_queries)
    size = max(1, min(rows // n_queries, size))
    # Bounds per tile, over the groups that exist: columns that any group sees, and that all see.
    far, exists = np.iinfo(np.int32).max, on_host.exists.numpy()
    host_low, host_high = on_host.low.numpy(), on_host.high.numpy()
    bounds = np.stack(
        [
            _per_tile(np.where(exists, host_low.min(2), far), size, far).min(1),
            _per_tile(np.where(exists, host_low.max(2), -1), size, -1).max(1),
            _per_tile(np.where(exists, host_high, far), size, far).min(1),
            _per_tile(np.where(exists, host_high, -1), size, -1).max(1),
        ],
        axis=1,
    ).tolist()
    for index, (start, all_from, all_to, stop) in enumerate(bounds):
        groups = slice(index * size, min((index + 1) * size, n_groups))
        start, stop = (start, stop) if start < stop else (0, 0)
        all_from, all_to = (all_from, all_to) if all_from < all_to else (stop, stop)
        hidden = []
        for part in (slice(start, min(all_from, stop)), slice(max(all_to, start), stop)):
            if part.start < part.stop:
                column = torch.arange(part.start, part.stop, device=low.device)
                unseen = (column < low[:, groups, :, None]) | (
                    column >= high[:, groups, None, None]
                )
                inside = slice(part.start - start, part.stop - start)
                hidden.append((inside, unseen[:, None, :, None]))
        yield Tile(groups=groups, columns=slice(start, stop), hidden=tuple(hidden))


def _per_tile(bound: np.ndarray, size: int, filling: int) -> np.ndarray:
    """(B, g) -> (tiles, B * size); the last tile is padded with `filling`."""
    missing = -bound.shape[1] % size
    filled = np.pad(bound, ((0, 0), (0, missing)), constant_values=filling)
    return filled.reshape(len(bound), -1, size).transpose(1, 0, 2).reshape(-1, len(bound) * size)


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scaling: float
) -> Tensor:
    """Attention of every query to the keys that it sees according to the plan.

    Args:
        query: (B, H * r, Q, E).
        key: (B, H, C, E).
        value: (B, H, C, F). All three have the same dtype.
        plan: which keys each query sees.
        scaling: multiplies the scores.

    Returns:
        (B, Q, H * r, F) in that dtype, differentiable with respect to all three.
    """
    return _SplitAttention.apply(query, key, value, plan, scaling)


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scaling: float
    ) -> Tensor:
        key, value = _rows_together(key), _rows_together(value)
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        for section in plan.sections:
            pass_ = _SectionPass(section, plan, query, key, value, scaling, n_buffers=2)
            pass_.rows_of(output.transpose(1, 2)).copy_(pass_.attend())
        ctx.save_for_backward(query, key, value, output)
        ctx.plan, ctx.scaling = plan, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        plan, scaling = ctx.plan, ctx.scaling
        d_output = gradients[0]
        d_query = torch.empty_like(query)
        # Many tiles add to the gradient of a key, and a sum in low precision would be inexact.
        wide = torch.float32 if key.dtype in (torch.bfloat16, torch.float16) else key.dtype
        d_key = torch.zeros(key.shape, dtype=wide, device=key.device)
        d_value = torch.zeros(value.shape, dtype=wide, device=value.device)
        # d score = weight * (d weight - sum over the row of weight * d weight), and the sum is the
        # product of the output with its gradient.
        row_sums = (d_output * output).sum(-1, keepdim=True)
        for section in plan.sections:
            pass_ = _SectionPass(section, plan, query, key, value, scaling, n_buffers=3)
            d_rows = pass_.differentiate(
                pass_.rows_of(d_output.transpose(1, 2)).contiguous(),
                pass_.rows_of(row_sums.transpose(1, 2)).contiguous(),
                d_key,
                d_value,
            )
            torch.mul(d_rows, scaling, out=pass_.rows_of(d_query))
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


class _SectionPass:
    """The attention of one section, forward or backward.

    Scores against own keys are computed in one product for all rollouts. Scores against document
    columns are computed tile by tile. Rows of scores are in the order (g, n, r, T).

    Args:
        section: the section of the plan.
        plan: which keys each query sees.
        query, key, value, scaling: as in `split_attention`; key and value are results of
            `_rows_together`.
        n_buffers: number of score matrices that exist at once.
    """

    def __init__(
        self,
        section: Section,
        plan: AttentionPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        *,
        n_buffers: int,
    ) -> None:
        self.section, self.plan = section, plan
        self.key, self.value = key, value
        self.batch = key.shape[:2]  # (B, H)
        n, tokens = section.per_group
        self.heads_per_key = query.shape[1] // key.shape[1]
        self.group_rows = n * self.heads_per_key * tokens
        view = self.rows_of(query)
        # (B, H, g * n, r, T, E), a copy, multiplied by `scaling`.
        self.rows = torch.mul(view, scaling, out=query.new_empty(view.shape))
        largest = max(
            (tile.groups.stop - tile.groups.start) * (tile.width + section.n_own)
            for tile in section.tiles
        )
        size = self.batch.numel() * self.group_rows * largest
        self._memory = [query.new_empty(size) for _ in range(n_buffers)]

    def rows_of(self, tensor: Tensor) -> Tensor:
        """(B, H * r, Q, X) -> (B, H, g * n, r, T, X), a view of the section's queries."""
        return (
            tensor[:, :, self.section.queries]
            .unflatten(1, (self.batch[1], -1))
            .unflatten(3, (self.section.n_rollouts, -1))
            .transpose(2, 3)
        )

    def attend(self) -> Tensor:
        """(B, H, g * n, r, T, F)."""
        rows, own = self._flat(self.rows), self.section.n_own > 0
        output = rows.new_empty(*rows.shape[:2], self.value.shape[3])
        own_scores = self._own_scores() if own else None
        own_weights = torch.empty_like(own_scores) if own_scores is not None else None
        for tile in self.section.tiles:
            place = self._place(tile)
            weights = self._weights(rows[:, place], tile, own_scores)
            values = self.value.flatten(0, 1)[:, tile.columns]
            torch.bmm(weights[..., : tile.width], values, out=output[:, place])
            if own_weights is not None:
                own_weights[:, place] = weights[..., tile.width :]
        if own_weights is not None:
            self._by_rollout(output).baddbmm_(self._by_rollout(own_weights), self._own(self.value))
        return output.view(*self.rows.shape[:-1], -1)

    def differentiate(
        self, d_output: Tensor, row_sums: Tensor, d_key: Tensor, d_value: Tensor
    ) -> Tensor:
        """Gradient of the scaled queries, (B, H, g * n, r, T, E).

        Args:
            d_output: (B, H, g * n, r, T, F), contiguous.
            row_sums: (B, H, g * n, r, T, 1), products of `d_output` with the output, summed over F.
            d_key, d_value: (B, H, C, E) and (B, H, C, F), added to in place.
        """
        rows, d_rows = self._flat(self.rows), torch.empty_like(self._flat(self.rows))
        d_output, row_sums = self._flat(d_output), self._flat(row_sums)
        own_scores = d_own_weights = own_weights = d_own_scores = None
        if self.section.n_own > 0:
            own_scores = self._own_scores()
            own_values = self._own(self.value).transpose(1, 2)
            d_own_weights = torch.bmm(self._by_rollout(d_output), own_values).view_as(own_scores)
            own_weights, d_own_scores = torch.empty_like(own_scores), torch.empty_like(own_scores)
        for tile in self.section.tiles:
            place, width = self._place(tile), tile.width
            weights = self._weights(rows[:, place], tile, own_scores)
            d_scores = self._buffer(2, tile)
            values = self.value.flatten(0, 1)[:, tile.columns]
            torch.bmm(d_output[:, place], values.transpose(1, 2), out=d_scores[..., :width])
            if d_own_weights is not None:
                d_scores[..., width:] = d_own_weights[:, place]
            d_scores.sub_(row_sums[:, place]).mul_(weights)
            keys = self.key.flatten(0, 1)[:, tile.columns]
            torch.bmm(d_scores[..., :width], keys, out=d_rows[:, place])
            _add_product(d_key, tile, d_scores[..., :width], rows[:, place])
            _add_product(d_value, tile, weights[..., :width], d_output[:, place])
            if own_weights is not None and d_own_scores is not None:
                own_weights[:, place] = weights[..., width:]
                d_own_scores[:, place] = d_scores[..., width:]
        if own_weights is not None and d_own_scores is not None:
            d_own_scores, own_weights = map(self._by_rollout, (d_own_scores, own_weights))
            self._by_rollout(d_rows).baddbmm_(d_own_scores, self._own(self.key))
            for total, weighed, by in (
                (d_key, d_own_scores, rows),
                (d_value, own_weights, d_output),
            ):
                product = torch.bmm(weighed.transpose(1, 2), self._by_rollout(by))
                own = self.plan.own_keys(total, self.section.n_own)
                own.copy_(product.view(own.shape))
        return d_rows.view(self.rows.shape)

    def _weights(self, rows: Tensor, tile: Tile, own_scores: Tensor | None) -> Tensor:
        """Softmax of each row over all keys that it sees: (B * H, c * w, P + O).

        Args:
            rows: (B * H, c * w, E), scaled queries of the tile.
            own_scores: (B * H, g * w, O).
        """
        scores, weights = self._buffer(0, tile), self._buffer(1, tile)
        keys = self.key.flatten(0, 1)[:, tile.columns]
        torch.bmm(rows, keys.transpose(1, 2), out=scores[..., : tile.width])
        if own_scores is not None:
            scores[..., tile.width :] = own_scores[:, self._place(tile)]
        if tile.hidden:
            by_group = self._by_group(scores)
            for part, unseen in tile.hidden:
                by_group[..., part].masked_fill_(unseen, -torch.inf)
        if scores.dtype in (torch.bfloat16, torch.float16):
            return weights.copy_(torch.softmax(scores, dim=-1, dtype=torch.float32))
        return torch.softmax(scores, dim=-1, out=weights)

    def _own_scores(self) -> Tensor:
        """Scores against own keys, (B * H, g * w, O); minus infinity for hidden keys."""
        own_hidden = self.section.own_hidden
        keys = self._own(self.key).transpose(1, 2)
        scores = torch.bmm(self._by_rollout(self._flat(self.rows)), keys)
        scores = scores.view(self.batch.numel(), -1, self.section.n_own)
        if own_hidden is not None:
            self._by_group(scores).masked_fill_(own_hidden, -torch.inf)
        return scores

    def _own(self, keys: Tensor) -> Tensor:
        """(B, H, C, E) -> (B * H * g * n, O, E), keys or values of the rollouts' own tokens."""
        return self.plan.own_keys(keys, self.section.n_own).flatten(0, 2)

    def _flat(self, rows: Tensor) -> Tensor:
        """(B, H, g * n, r, T, X) -> (B * H, g * w, X)."""
        return rows.flatten(0, 1).flatten(1, 3)

    def _by_rollout(self, rows: Tensor) -> Tensor:
        """(B * H, g * w, X) -> (B * H * g * n, r * T, X)."""
        return rows.view(rows.shape[0] * self.section.n_rollouts, -1, rows.shape[-1])

    def _by_group(self, rows: Tensor) -> Tensor:
        """(B * H, c * w, X) -> (B, H, c, n * r, T, X)."""
        n, tokens = self.section.per_group
        by_token = (rows.shape[1] // self.group_rows, n * self.heads_per_key, tokens)
        return rows.unflatten(0, self.batch).unflatten(2, by_token)

    def _place(self, tile: Tile) -> slice:
        """The slice of a tile's rows among the g * w rows of the section."""
        return slice(tile.groups.start * self.group_rows, tile.groups.stop * self.group_rows)

    def _buffer(self, index: int, tile: Tile) -> Tensor:
        """An uninitialised matrix (B * H, c * w, P + O); all tiles use the same memory."""
        n_rows = (tile.groups.stop - tile.groups.start) * self.group_rows
        shape = (self.batch.numel(), n_rows, tile.width + self.section.n_own)
        return self._memory[index][: shape[0] * shape[1] * shape[2]].view(shape)


def _rows_together(tensor: Tensor) -> Tensor:
    """The tensor (B, H, C, E), copied if its first two dimensions cannot be viewed as one."""
    together = tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if together and tensor.stride(3) == 1 else tensor.contiguous()


def _add_product(total: Tensor, tile: Tile, weights: Tensor, rows: Tensor) -> None:
    """Add `weights^T rows` to the tile's columns.

    Args:
        total: (B, H, C, E), contiguous.
        weights: (B * H, c * w, P).
        rows: (B * H, c * w, E).
    """
    columns = total.flatten(0, 1)[:, tile.columns]
    if total.dtype == weights.dtype:
        columns.baddbmm_(weights.transpose(1, 2), rows)
    else:
        columns.add_(torch.bmm(weights.transpose(1, 2), rows))
