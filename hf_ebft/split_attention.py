"""Attention over packed rows without a mask of the whole row.

What a token of the packed row sees is a stretch of document columns, the same for all rollouts of a
block, and for a rollout token its own earlier tokens. So the scores are computed against
``[stretch of the document | own rollout]`` only, tile by tile, with one softmax over both: about
R * (S / 2 + G) pairs instead of R * R, in plain matrix products. The backward pass computes the
scores again instead of keeping them (as in FlashAttention, Dao et al. 2022, section 3.1). Heads
that share keys and values (grouped-query attention) share a product; nothing is repeated.

Dimension letters: B rows, H heads of keys and values, r query heads to each of them, Q queries and
C keys of the pass, S document tokens (the first S keys), E and F widths of a head (keys, values).
A tile: c groups of queries that see the same columns, n rollouts in a group, T of their tokens,
P columns that any of them sees, O own keys of a rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows of scores that a tile has per query head, at most about: enough for an efficient matrix
# product, and few enough for the scores to stay in a CPU's cache, or in a small part of a GPU's
# memory.
TILE_ROWS = {"cpu": 256, "cuda": 2048}
# A tile computes every column that any of its groups sees. With so many tiles, what it computes in
# vain is about one part in as many; but tiles below the second number cost more than they save.
TILES, FEWEST_ROWS = 12, 128


@dataclass(frozen=True)
class Stretches:
    """Which document columns each query sees: ``low <= column < high``.

    Attributes:
        low: (B, g, T), T tokens of each of g groups (T = 1 if all see alike).
        high: (B, g).
        there: (B, g) bool; groups that are not there see something, and nobody looks at it.
        per_group: queries of a group, n rollouts of T tokens: (n, T).
    """

    low: Tensor
    high: Tensor
    there: Tensor
    per_group: tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """Queries that are computed together.

    Attributes:
        groups: first and last + 1 of the groups.
        queries: where they are among the queries of the pass.
        per_group: (n, T).
        columns: the document columns that any of them sees.
        hidden: parts of ``columns`` that not all of them see, with (B, 1, c, 1, T or 1, columns)
            bool, True where a query does not see a column.
        own: whether they also see tokens of their own rollouts.
    """

    groups: tuple[int, int]
    queries: slice
    per_group: tuple[int, int]
    columns: slice
    hidden: tuple[tuple[slice, Tensor], ...]
    own: bool


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom in one forward pass, as tiles.

    Attributes:
        tiles: they cover every query once.
        n_queries: Q.
        n_keys: C.
        document_width: S.
        own_hidden: (B or 1, 1, K or 1, 1, T, O) bool, own tokens that a rollout token does not see.
        step_major: whether the keys of the rollouts stand token after token (as in a cache that
            grows by steps) instead of rollout after rollout.
    """

    tiles: tuple[Tile, ...]
    n_queries: int
    n_keys: int
    document_width: int
    own_hidden: Tensor
    step_major: bool

    @property
    def n_own(self) -> int:
        """O, the keys of a rollout's own."""
        return self.own_hidden.shape[-1]

    def own_keys(self, keys: Tensor, tile: Tile) -> Tensor:
        """View of the tile's own keys or values: (B, H, C, E) -> (B, H, c * n, O, E)."""
        rollouts = slice(*(group * tile.per_group[0] for group in tile.groups))
        own = keys[:, :, self.document_width :]
        n_rollouts = own.shape[2] // self.n_own
        if self.step_major:
            return own.unflatten(2, (self.n_own, n_rollouts))[:, :, :, rollouts].transpose(2, 3)
        return own.unflatten(2, (n_rollouts, self.n_own))[:, :, rollouts]


def make_tiles(stretches: Stretches, first_query: int, *, own: bool) -> Iterator[Tile]:
    """Cut groups of queries into tiles.

    Args:
        stretches: of consecutive groups.
        first_query: where the first group's first query is among the queries of the pass.
        own: whether the queries also see their own rollouts' tokens.
    """
    low, high, there = stretches.low, stretches.high, stretches.there
    n_groups, per_group = high.shape[1], stretches.per_group
    n_queries = per_group[0] * per_group[1]
    rows = TILE_ROWS["cpu" if low.device.type == "cpu" else "cuda"]
    size = max(-(-n_groups // TILES), FEWEST_ROWS // n_queries)
    size = max(1, min(rows // n_queries, size))
    # Bounds over the groups that are there: the whole tile's columns, and those that all see.
    # One trip to the host for all tiles.
    far = torch.iinfo(torch.int32).max
    absent = ~there
    bounds = torch.stack(
        [
            _per_tile(low.amin(2).masked_fill(absent, far), size, far).amin(dim=1),
            _per_tile(low.amax(2).masked_fill(absent, -1), size, -1).amax(dim=1),
            _per_tile(high.masked_fill(absent, far), size, far).amin(dim=1),
            _per_tile(high.masked_fill(absent, -1), size, -1).amax(dim=1),
        ],
        dim=1,
    ).tolist()
    for index, (start, all_from, all_to, stop) in enumerate(bounds):
        first, last = index * size, min((index + 1) * size, n_groups)
        start, stop = (start, stop) if start < stop else (0, 0)
        all_from, all_to = (all_from, all_to) if all_from < all_to else (stop, stop)
        hidden = []
        for part in (slice(start, min(all_from, stop)), slice(max(all_to, start), stop)):
            if part.start < part.stop:
                column = torch.arange(part.start, part.stop, device=low.device)
                unseen = (column < low[:, first:last, :, None]) | (
                    column >= high[:, first:last, None, None]
                )
                inside = slice(part.start - start, part.stop - start)
                hidden.append((inside, unseen[:, None, :, None]))
        yield Tile(
            groups=(first, last),
            queries=slice(first_query + first * n_queries, first_query + last * n_queries),
            per_group=per_group,
            columns=slice(start, stop),
            hidden=tuple(hidden),
            own=own,
        )


def _per_tile(bound: Tensor, size: int, filling: int) -> Tensor:
    """(B, g) -> (tiles, B * size), the last tile filled up."""
    missing = -bound.shape[1] % size
    filled = torch.nn.functional.pad(bound, (0, missing), value=filling)
    return filled.unflatten(1, (-1, size)).transpose(0, 1).flatten(1)


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scaling: float
) -> Tensor:
    """Attention of every query to what the plan lets it see.

    Args:
        query: (B, H * r, Q, E).
        key: (B, H, C, E).
        value: (B, H, C, F), of one dtype with the others.
        plan: who sees whom.
        scaling: multiplies the scores.

    Returns:
        (B, Q, H * r, F) in the dtype of the arguments, with gradients for all three.
    """
    return _SplitAttention.apply(query, key, value, plan, scaling)


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scaling: float
    ) -> Tensor:
        key, value = _rows_together(key), _rows_together(value)
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        work = _Workspace.of(query, key, plan, buffers=2)
        for tile in plan.tiles:
            tiled = _scaled(_to_tile(query, tile, key.shape[1]), scaling)
            weights = _weights(tiled, key, tile, plan, work)
            _to_tile(output.transpose(1, 2), tile, key.shape[1]).copy_(
                _times_columns(weights, value, tile, plan).unflatten(2, tiled.shape[2:5])
            )
        ctx.save_for_backward(query, key, value, output)
        ctx.plan, ctx.scaling = plan, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        plan, scaling = ctx.plan, ctx.scaling
        d_output = gradients[0]
        d_query = torch.empty_like(query)
        # Many tiles add to the gradient of a key; sums of low precision would lose them.
        wide = torch.float32 if key.dtype in (torch.bfloat16, torch.float16) else key.dtype
        d_key = torch.zeros(key.shape, dtype=wide, device=key.device)
        d_value = torch.zeros(value.shape, dtype=wide, device=value.device)
        work = _Workspace.of(query, key, plan, buffers=3)
        heads = key.shape[1]
        for tile in plan.tiles:
            tiled = _scaled(_to_tile(query, tile, heads), scaling)
            weights = _weights(tiled, key, tile, plan, work)
            d_tile = _to_tile(d_output.transpose(1, 2), tile, heads).contiguous()
            # d score = weight * (d weight - sum over the row of weight * d weight), and the sum is
            # the product of the output with its gradient.
            row_sum = (d_tile * _to_tile(output.transpose(1, 2), tile, heads)).sum(-1).flatten(2)
            d_scores = _against_columns(d_tile, value, tile, plan, work.buffer(2, tile))
            d_scores.sub_(row_sum[..., None]).mul_(weights)
            d_tiled = _times_columns(d_scores, key, tile, plan).mul_(scaling)
            _to_tile(d_query, tile, heads).copy_(d_tiled.unflatten(2, tiled.shape[2:5]))
            _add_to_columns(d_key, d_scores, tiled, tile, plan)
            _add_to_columns(d_value, weights, d_tile, tile, plan)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


@dataclass(frozen=True)
class _Workspace:
    """Memory for the scores of one tile, used again for the next.

    Attributes:
        memory: one flat piece per buffer.
        shape: (B, H, r), to know how many scores a tile has.
        n_own: O.
    """

    memory: Sequence[Tensor]
    shape: tuple[int, int, int]
    n_own: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, plan: AttentionPlan, *, buffers: int) -> _Workspace:
        rows, heads = key.shape[:2]
        shape = (rows, heads, query.shape[1] // heads)
        largest = max(_tile_size(tile, shape, plan.n_own) for tile in plan.tiles)
        return cls([query.new_empty(largest) for _ in range(buffers)], shape, plan.n_own)

    def buffer(self, index: int, tile: Tile) -> Tensor:
        """(B, H, c * n * r * T, P + O), uninitialised."""
        size = _tile_size(tile, self.shape, self.n_own)
        rows = self.shape[2] * (tile.queries.stop - tile.queries.start)
        return self.memory[index][:size].view(*self.shape[:2], rows, _width(tile, self.n_own))


def _width(tile: Tile, n_own: int) -> int:
    return tile.columns.stop - tile.columns.start + (n_own if tile.own else 0)


def _tile_size(tile: Tile, shape: tuple[int, int, int], n_own: int) -> int:
    n_queries = tile.queries.stop - tile.queries.start
    return shape[0] * shape[1] * shape[2] * n_queries * _width(tile, n_own)


def _rows_together(tensor: Tensor) -> Tensor:
    """The tensor (B, H, C, E) in an order of memory whose first two dimensions are like one."""
    together = tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if together and tensor.stride(3) == 1 else tensor.contiguous()


def _to_tile(tensor: Tensor, tile: Tile, heads: int) -> Tensor:
    """(B, H * r, Q, E) -> (B, H, c * n, r, T, E), a view of the tile's queries."""
    n, tokens = tile.per_group
    n_rollouts = (tile.groups[1] - tile.groups[0]) * n
    return (
        tensor[:, :, tile.queries]
        .unflatten(1, (heads, -1))
        .unflatten(3, (n_rollouts, tokens))
        .transpose(2, 3)
    )


def _scaled(view: Tensor, scaling: float) -> Tensor:
    """A contiguous copy, scaled on the way."""
    return torch.mul(view, scaling, out=view.new_empty(view.shape))


def _against_columns(
    rows: Tensor, columns: Tensor, tile: Tile, plan: AttentionPlan, out: Tensor
) -> Tensor:
    """Products of the tile's rows with the vectors of all that they see.

    Args:
        rows: (B, H, c * n, r, T, E), contiguous.
        columns: (B, H, C, E), keys or values.
        out: (B, H, c * n * r * T, P + O), where the result goes.
    """
    n_columns = tile.columns.stop - tile.columns.start
    flat = out.flatten(0, 1)
    seen = columns[:, :, tile.columns].flatten(0, 1)
    torch.bmm(rows.flatten(2, 4).flatten(0, 1), seen.transpose(1, 2), out=flat[..., :n_columns])
    if tile.own:
        own = plan.own_keys(columns, tile).flatten(0, 2)
        products = torch.bmm(rows.flatten(0, 2).flatten(1, 2), own.transpose(1, 2))
        out[..., n_columns:] = products.view(*out.shape[:3], plan.n_own)
    return out


def _times_columns(weights: Tensor, columns: Tensor, tile: Tile, plan: AttentionPlan) -> Tensor:
    """Sums of the vectors that each row sees, by its weights.

    Args:
        weights: (B, H, c * n * r * T, P + O).
        columns: (B, H, C, E).

    Returns:
        (B, H, c * n * r * T, E).
    """
    n_columns = tile.columns.stop - tile.columns.start
    flat = weights.flatten(0, 1)
    sums = torch.bmm(flat[..., :n_columns], columns[:, :, tile.columns].flatten(0, 1))
    if tile.own:
        own = plan.own_keys(columns, tile).flatten(0, 2)
        own_weights = weights[..., n_columns:].reshape(own.shape[0], -1, plan.n_own)
        sums += torch.bmm(own_weights, own).view_as(sums)
    return sums.unflatten(0, weights.shape[:2])


def _add_to_columns(
    total: Tensor, weights: Tensor, rows: Tensor, tile: Tile, plan: AttentionPlan
) -> None:
    """Add ``weights^T rows`` to all that the tile sees: the transpose of `_times_columns`.

    Args:
        total: (B, H, C, E), added to in place; contiguous.
        weights: (B, H, c * n * r * T, P + O).
        rows: (B, H, c * n, r, T, E), contiguous.
    """
    n_columns = tile.columns.stop - tile.columns.start
    flat_rows = rows.flatten(2, 4).flatten(0, 1)
    seen = total.flatten(0, 1)[:, tile.columns]
    transposed = weights.flatten(0, 1)[..., :n_columns].transpose(1, 2)
    if total.dtype == weights.dtype:
        seen.baddbmm_(transposed, flat_rows)
    else:
        seen.add_(torch.bmm(transposed, flat_rows))
    if tile.own:
        own = plan.own_keys(total, tile)
        own_weights = weights[..., n_columns:].reshape(own.shape[:3].numel(), -1, plan.n_own)
        own_rows = rows.flatten(0, 2).flatten(1, 2)
        own.copy_(torch.bmm(own_weights.transpose(1, 2), own_rows).view(own.shape))


def _weights(
    tiled: Tensor, key: Tensor, tile: Tile, plan: AttentionPlan, work: _Workspace
) -> Tensor:
    """Softmax over all that each query sees: (B, H, c * n * r * T, P + O).

    Args:
        tiled: (B, H, c * n, r, T, E), scaled queries of the tile.
    """
    scores = _against_columns(tiled, key, tile, plan, work.buffer(0, tile))
    n_columns = tile.columns.stop - tile.columns.start
    n, tokens = tile.per_group
    # (B, H, c, n * r, T, P + O)
    n_groups = tile.groups[1] - tile.groups[0]
    by_group = scores.unflatten(2, (n_groups, n * tiled.shape[3], tokens))
    for part, unseen in tile.hidden:
        by_group[..., part].masked_fill_(unseen, -torch.inf)
    if tile.own:
        own_hidden = plan.own_hidden
        if own_hidden.shape[2] > 1:
            own_hidden = own_hidden[:, :, tile.groups[0] : tile.groups[1]]
        by_group[..., n_columns:].masked_fill_(own_hidden, -torch.inf)
    weights = work.buffer(1, tile)
    if scores.dtype in (torch.bfloat16, torch.float16):
        return weights.copy_(torch.softmax(scores, dim=-1, dtype=torch.float32))
    return torch.softmax(scores, dim=-1, out=weights)
