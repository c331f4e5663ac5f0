"""flex_attention's block masks of packed rows, by arithmetic on the layout's own numbers.

`create_block_mask` evaluates the mask of every pair of query and key to find out which tiles of 128
by 128 hold nothing, something or everything. In a packed row a query sees one stretch of document
columns and some of its own tokens, so that the keys it sees in a tile can be counted.

Dimension letters: B rows of the batch, Q queries, C keys, O own keys of a rollout, q and c tiles of
queries and of keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hf_ebft.rows.sending import sent

MaskByPair = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Queries and keys of a tile: what flex_attention's kernels are written for.
TILE = 128
# Block masks that are kept: a step has some for every chunk of rollouts and every kind of layer.
KEPT = 64


@dataclass(frozen=True)
class VisibleKeys:
    """Which keys each query sees, in the host's memory.

    Attributes:
        low, high: (B, Q) int64, document columns `low <= column < high`.
        own: (B, Q, O) bool, which of its own tokens it sees.
        own_place: (Q, O) int64, where these stand among the keys.
        has_own: (Q,) bool, the queries of rollouts.
        n_keys: C.
    """

    low: np.ndarray
    high: np.ndarray
    own: np.ndarray
    own_place: np.ndarray
    has_own: np.ndarray
    n_keys: int

    def tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, q, c) bool: tiles in which some query sees some key, and in which all see all.

        Tiles that reach beyond the last query or key never count as full.
        """
        found = [self._tiles_of_row(row) for row in range(len(self.low))]
        some, full = (np.stack(tiles) for tiles in zip(*found, strict=True))
        return some, full

    def _tiles_of_row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        n_queries = self.low.shape[1]
        first = np.arange(0, self.n_keys, TILE)
        low, high = self.low[row, :, None], self.high[row, :, None]
        seen = np.maximum(np.minimum(high, first + TILE) - np.maximum(low, first), 0)
        query = np.arange(n_queries)
        for own, place in zip(self.own[row].T, self.own_place.T, strict=True):
            seen[query, place // TILE] += own
        missing = -n_queries % TILE
        by_tile = np.pad(seen, ((0, missing), (0, 0))).reshape(-1, TILE, len(first))
        return np.asarray((by_tile > 0).any(axis=1)), np.asarray((by_tile == TILE).all(axis=1))


def block_mask(
    visible: VisibleKeys,
    device: torch.device,
    *,
    at_least: VisibleKeys | None = None,
    mask_mod: MaskByPair | None = None,
) -> BlockMask:
    """The block mask of these queries and keys, on a device.

    Args:
        visible: who sees whom; where that changes while the mask is in use, at most.
        device: of the mask.
        at_least: who sees whom at any time, where that changes.
        mask_mod: who sees whom by pair, where that changes.
    """
    some, full = visible.tiles()
    if at_least is not None:
        full = at_least.tiles()[1]
    partly, wholly = (_listed(tiles, device) for tiles in (some & ~full, full))
    return BlockMask.from_kv_blocks(
        *partly,
        *wholly,
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod or mask_by_pair(visible, device),
        seq_lengths=(visible.low.shape[1], visible.n_keys),
    )


def mask_by_pair(visible: VisibleKeys, device: torch.device) -> MaskByPair:
    """Who sees whom by the indices of rows, heads, queries and keys.

    What a kernel evaluates in tiles that are neither empty nor full: whether a key lies in one of
    two ranges. Numbers of queries alone, since a kernel holds what belongs to keys in registers of
    its own, 64 of them for two numbers a key. Every mask runs the same code on tensors of its own,
    so that what was compiled for one serves another.
    """
    own_from = own_to = visible.low * 0
    place_of = np.arange(visible.n_keys)
    if visible.has_own.any() and visible.own.shape[-1] > 0:
        n_own = visible.own.shape[-1]
        places = visible.own_place[visible.has_own]
        rollout = np.unique(places[:, 0], return_inverse=True)[1]
        # As if the keys of a rollout stood side by side: what a query sees of them is one range.
        begin = places.min() + rollout * n_own
        place_of[places] = begin[:, None] + np.arange(n_own)
        own = visible.own[:, visible.has_own]
        own_from, own_to = own_from.copy(), own_to.copy()
        own_from[:, visible.has_own] = begin + own.argmax(axis=-1)
        own_to[:, visible.has_own] = begin + own.argmax(axis=-1) + own.sum(axis=-1)
    numbers = (visible.low, visible.high, own_from, own_to)
    low, high, own_low, own_high = (sent(number.astype(np.int32), device) for number in numbers)

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_document = (low[row, query] <= key) & (key < high[row, query])
        return of_document | ((own_low[row, query] <= key) & (key < own_high[row, query]))

    if np.array_equal(place_of, np.arange(visible.n_keys)):
        return mask_mod
    place = sent(place_of.astype(np.int32), device)

    # Keys stand step by step, as in a cache that grows.
    def mask_mod_by_step(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_mod(row, head, query, place[key])

    return mask_mod_by_step


def _listed(tiles: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, q, c) bool -> how many tiles of keys, (B, 1, q) int32, and which first, (B, 1, q, c)."""
    order = np.argsort(~tiles, axis=-1, kind="stable").astype(np.int32)
    how_many = tiles.sum(axis=-1, dtype=np.int32)
    return sent(how_many[:, None], device), sent(order[:, None], device)


class BlockMaskCache:
    """The block masks made last, by all that decides them.

    Rows without padding have the same one in every batch, and what was compiled for it stays.
    """

    def __init__(self) -> None:
        self._masks: OrderedDict[Any, BlockMask] = OrderedDict()

    def get(self, key: Any, make: Callable[[], BlockMask]) -> BlockMask:
        """The mask of this key, made now if it is none of the last ones."""
        if key not in self._masks:
            self._masks[key] = make()
            if len(self._masks) > KEPT:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key]
