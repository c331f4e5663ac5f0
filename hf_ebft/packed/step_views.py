"""Which keys the queries of decoding steps see: one `StepView` per kind of layer and batch.

The shapes of a view are the same in all steps. Its values are computed on the device, from the
number of the step.

Dimension letters: B rows of the batch, S document tokens, K blocks, n samples, m = K * n rollouts
of a row, O slots for own keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hf_ebft.packed.attention_functions import HIDDEN
from hf_ebft.packed.block_masks import MaskByPair, VisibleKeys, block_mask
from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.masks import FULL, MaskRecipe
from hf_ebft.packed.step_attention import DocumentTile, StepView, fused_attention_works
from hf_ebft.rows.anchors import Blocks
from hf_ebft.rows.layout import PackedLayout

# On a CPU: approximate minimum of rollouts per tile, and maximum number of tiles. A tile computes
# every column that at least one of its rollouts sees.
TILE_ROLLOUTS, TILES = 128, 16


class StepViews:
    """The views of a batch's decoding steps, set to one step at a time.

    Args:
        recipe: how the model's masks are made.
        layout: the batch.
        n_slots: O.
        width: number of columns of the documents' keys, at least S.
        static: whether shapes must be independent of where blocks and documents lie. If so, there
            is one tile with all rollouts and columns or, with flex_attention, a block mask.
    """

    def __init__(
        self, recipe: MaskRecipe, layout: PackedLayout, n_slots: int, *, width: int, static: bool
    ) -> None:
        self.recipe, self.n_samples = recipe, layout.n_samples
        self._static, self._width = static, width
        # Per rollout, (B, m): columns where its document starts and where its prefix ends, and the
        # prefix's length.
        self._start, self._end, self._length = self._prefixes(layout)
        device = self._start.device
        self._slot = torch.arange(n_slots, device=device)
        # For layers without a window: the bias of each slot, in each step.
        self._own_bias = (self._slot > self._slot[:, None]) * HIDDEN
        self._column = torch.arange(width, device=device)
        # Per kind of layer, (B, m): the first document column that a rollout sees in this step.
        self._low = {
            kind: self._start if kind == FULL else torch.empty_like(self._start)
            for kind in recipe.layer_types
        }
        self.by_kind = {kind: self._view(kind, layout) for kind in recipe.layer_types}
        self.move_to(torch.zeros(1, dtype=torch.long, device=device), anew=True)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that differ from batch to batch."""
        found = [self._start, self._end, self._length]
        for view in self.by_kind.values():
            found += [tile.bias for tile in view.tiles]
            if (mask := view.block_mask) is not None:
                listed = mask.kv_num_blocks, mask.kv_indices
                full = mask.full_kv_num_blocks, mask.full_kv_indices
                found += [part for part in (*listed, *full) if part is not None]
        return found

    @property
    def shape(self) -> tuple[Any, ...]:
        """The bounds of all tiles. A captured step serves batches with the same bounds."""
        return tuple(
            (kind, tile.rollouts.stop, tile.columns.start, tile.columns.stop)
            for kind, view in self.by_kind.items()
            for tile in view.tiles
        )

    def move_to(self, step: Tensor, *, anew: bool = False) -> None:
        """Set the views' values to those of a step.

        Args:
            step: (1,) int64, number of the step.
            anew: whether to set also the values that are the same in all steps.
        """
        for kind, view in self.by_kind.items():
            if kind == FULL:
                torch.index_select(self._own_bias, 0, step, out=view.own_bias[0, 0])
                if not anew:
                    continue
            else:
                first = self.recipe.first_visible(kind, self._length + step)
                early = self._length[..., None] + self._slot < first[..., None]
                hidden = (self._slot > step) | early.flatten(0, 1)
                torch.mul(hidden[:, None, None], HIDDEN, out=view.own_bias)
                torch.add(self._start, torch.minimum(first, self._length), out=self._low[kind])
            for tile in view.tiles:
                column = self._column[tile.columns]
                of_tile = (slice(None), tile.rollouts, None)
                unseen = (column < self._low[kind][of_tile]) | (column >= self._end[of_tile])
                torch.mul(unseen[:, None], HIDDEN, out=tile.bias)

    def _prefixes(self, layout: PackedLayout) -> list[Tensor]:
        blocks = layout.blocks
        return [
            part.repeat_interleave(self.n_samples, dim=1)
            for part in (blocks.column - blocks.position, blocks.column, blocks.position)
        ]

    def _view(self, kind: str, layout: PackedLayout) -> StepView:
        """A view whose values `move_to` has yet to set."""
        rows, rollouts = self._start.shape
        device = self._slot.device
        alike = 1 if kind == FULL else rows * rollouts
        fused = device.type == "cpu" and fused_attention_works()
        own_bias = torch.empty(alike, 1, 1, len(self._slot), device=device)
        if self._static and self.recipe.implementation == FLEX:
            return StepView((), own_bias, self._block_mask(kind, layout), fused)
        tiles = []
        for of_tile, columns in self._tiles(kind, layout):
            shape = (rows, 1, _length(of_tile), _length(columns))
            tiles.append(DocumentTile(of_tile, columns, torch.empty(shape, device=device)))
        return StepView(tuple(tiles), own_bias, fused=fused)

    def _tiles(self, kind: str, layout: PackedLayout) -> list[tuple[slice, slice]]:
        """Slices of the rollouts and of the columns of every tile."""
        if self._static:
            return [(slice(0, self._start.shape[1]), slice(0, self._width))]
        n_blocks = layout.blocks.exists.shape[1]
        size = max(-(-n_blocks // TILES), -(-TILE_ROLLOUTS // self.n_samples))
        return [
            (
                slice(at * self.n_samples, min(at + size, n_blocks) * self.n_samples),
                self._columns(kind, layout.on_host.blocks[at : at + size]),
            )
            for at in range(0, n_blocks, size)
        ]

    def _columns(self, kind: str, blocks: Blocks) -> slice:
        """Document columns that some rollout of these blocks sees in some step; at least one."""
        exists = blocks.exists.numpy()
        if not exists.any():
            return slice(0, 1)
        low = blocks.column - blocks.position + self.recipe.first_visible(kind, blocks.position)
        low = torch.minimum(low, blocks.column - 1)
        bounds = low.numpy()[exists].min(), blocks.column.numpy()[exists].max()
        return slice(*map(int, bounds))

    def _block_mask(self, kind: str, layout: PackedLayout) -> BlockMask:
        """A block mask of the document columns that is valid in all steps.

        Windows move over the columns from step to step.
        """
        start, end, length = (part.numpy() for part in self._prefixes(layout.on_host))
        rows, rollouts = start.shape
        by_step = []
        for step in (0, len(self._slot) - 1):
            first = self.recipe.first_visible(kind, torch.from_numpy(length + step)).numpy()
            low = start + np.minimum(first, length)
            by_step.append(
                VisibleKeys(
                    low,
                    end,
                    own=np.zeros((rows, rollouts, 0), dtype=bool),
                    own_place=np.zeros((rollouts, 0), dtype=np.int64),
                    has_own=np.zeros(rollouts, dtype=bool),
                    n_keys=self._width,
                )
            )
        mask_mod = self._mask_mod(self._low[kind], self._end)
        device = self._start.device
        return block_mask(by_step[0], device, at_least=by_step[1], mask_mod=mask_mod)

    def _mask_mod(self, low: Tensor, end: Tensor) -> MaskByPair:
        def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= low[row, query]) & (key < end[row, query])

        return mask_mod


def _length(part: slice) -> int:
    return int(part.stop - part.start)
