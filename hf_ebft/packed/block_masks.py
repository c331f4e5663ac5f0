"""Block masks of packed rows for flex_attention, computed from the layout.

A block mask says which tiles of 128 queries by 128 keys are empty, partly visible or fully visible.
torch's `create_block_mask` evaluates the mask for every pair of query and key to find this out. In
a packed row, a query sees one range of document columns and some tokens of its own rollout. So this
module counts the visible keys of each query in each tile instead.

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
# Queries, and keys, of a tile: the default block size of flex_attention's kernels.
TILE = 128
# Block masks that are kept: a training step has several per chunk of rollouts and kind of layer.
KEPT = 64


@dataclass(frozen=True)
class VisibleKeys:
    """Which keys each query sees, in the host's memory.

    Attributes:
        low, high: (B, Q) int64, a query sees the document columns `low <= column < high`.
        own: (B, Q, O) bool, which tokens of its own rollout a query sees.
        own_place: (Q, O) int64, index of these tokens among the keys.
        has_own: (Q,) bool, whether the query is a rollout token.
        n_keys: C.
    """

    low: np.ndarray
    high: np.ndarray
    own: np.ndarray
    own_place: np.ndarray
    has_own: np.ndarray
    n_keys: int

    def tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """Two (B, q, c) bool arrays: tiles with a visible pair, and tiles with all pairs visible.

        Tiles that extend beyond the last query or key never count as fully visible.
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
    """Make the block mask for the given visibility.

    Args:
        visible: which keys each query sees. If that changes while the mask is in use: every key
            that it sees at any time.
        device: device of the mask.
        at_least: the keys that each query sees at all times; None: visibility does not change.
        mask_mod: the current visibility of a pair; None: visibility does not change.
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
    """Make a function (row, head, query, key) -> whether the query sees the key.

    A kernel evaluates it in partly visible tiles. It tests whether the key lies in one of two
    ranges, whose bounds are stored per query. Numbers stored per key would take registers in the
    kernel: 64 of them for two numbers per key. All masks run the same code with their own tensors,
    so that a kernel compiled for one mask serves the others.

    Args:
        visible: which keys each query sees.
        device: device of the mask.
    """
    own_from = own_to = visible.low * 0
    place_of = np.arange(visible.n_keys)
    if visible.has_own.any() and visible.own.shape[-1] > 0:
        n_own = visible.own.shape[-1]
        places = visible.own_place[visible.has_own]
        rollout = np.unique(places[:, 0], return_inverse=True)[1]
        # Number the keys so that those of a rollout are adjacent: a query then sees one range.
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

    # The keys are ordered by step first, as in a cache that grows.
    def mask_mod_by_step(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_mod(row, head, query, place[key])

    return mask_mod_by_step


def _listed(tiles: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Convert (B, q, c) bool into the lists that a BlockMask holds.

    Returns:
        (B, 1, q) int32, number of True tiles of keys; (B, 1, q, c) int32, all tiles of keys, those
        that are True first.
    """
    order = np.argsort(~tiles, axis=-1, kind="stable").astype(np.int32)
    how_many = tiles.sum(axis=-1, dtype=np.int32)
    return sent(how_many[:, None], device), sent(order[:, None], device)


class BlockMaskCache:
    """The most recent block masks, by everything that determines them.

    Rows without padding have the same block mask in every batch.
    """

    def __init__(self) -> None:
        self._masks: OrderedDict[Any, BlockMask] = OrderedDict()

    def get(self, key: Any, make: Callable[[], BlockMask]) -> BlockMask:
        """The mask of this key; it is made if it is not among the recent ones."""
        if key not in self._masks:
            self._masks[key] = make()
            if len(self._masks) > KEPT:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key]
