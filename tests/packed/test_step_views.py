"""What decoding steps see is what the one definition of visibility says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_ebft.packed.block_masks import TILE
from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.masks import CHUNKED, FULL, SLIDING, MaskRecipe
from hf_ebft.packed.step_views import StepViews
from hf_ebft.rows.layout import PackedLayout
from tests.support.exactness import Case, packed_documents, ragged_batch

CASES = {
    "ragged": Case(ragged_batch(33, 21, 5), stride=6, generate_max_len=9),
    "left padded": Case(ragged_batch(26, 19, left=True), stride=2, generate_max_len=5),
    "packed documents": Case(
        packed_documents([15, 9, 4], [20]), stride=4, context_length=1, n_samples=3
    ),
    "many tiles": Case(ragged_batch(700, 500), stride=5, n_samples=3, generate_max_len=8),
}


def recipe(implementation: str) -> MaskRecipe:
    kinds = (FULL, SLIDING, CHUNKED)
    return MaskRecipe(implementation, kinds, True, window=150, chunk=140, dtype=torch.float32)


def short(implementation: str) -> MaskRecipe:
    kinds = (FULL, SLIDING, CHUNKED)
    return MaskRecipe(implementation, kinds, True, window=4, chunk=5, dtype=torch.float32)


def expected(recipe: MaskRecipe, kind: str, layout: PackedLayout, step: int) -> Tensor:
    """(B, m, S + O) bool: the documents' columns and the own tokens a step sees, O = G - 1."""
    part = layout.step_part(step)
    rollouts = part.queries.slot.shape[1]
    seen = recipe.allowed(
        kind,
        part.queries.map(lambda field: field[:, :, None]),
        layout.coordinates.map(lambda field: field[:, None, :]),
    )
    own = seen[:, :, layout.document_width :].unflatten(2, (rollouts, layout.length))
    index = torch.arange(rollouts)
    own = own[:, index, index, :-1]
    return torch.cat([seen[:, :, : layout.document_width], own], dim=2)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_biases_are_the_definition_of_visibility(name: str, static: bool) -> None:
    layout = CASES[name].layout()
    rule = (recipe if name == "many tiles" else short)("sdpa")
    n_slots, width = layout.length - 1, layout.document_width + 3 * static
    views = StepViews(rule, layout, n_slots, width=width, static=static)
    exists = layout.blocks.exists.repeat_interleave(layout.n_samples, dim=1)
    for step in range(n_slots):
        views.move_to(torch.tensor([step]))
        for kind, view in views.by_kind.items():
            found = torch.zeros(*exists.shape, width + n_slots, dtype=torch.bool)
            for tile in view.tiles:
                found[:, tile.rollouts, tile.columns] = (tile.bias == 0)[:, 0]
            own = (view.own_bias == 0).expand(exists.numel(), -1, -1, -1)
            found[..., width:] = own.view(*exists.shape, n_slots)
            assert not found[..., layout.document_width : width][exists].any()
            found = torch.cat([found[..., : layout.document_width], found[..., width:]], dim=2)
            assert torch.equal(found[exists], expected(rule, kind, layout, step)[exists])


@pytest.mark.parametrize("rule", [recipe, short])
def test_block_masks_hold_for_every_step(rule: Callable[[str], MaskRecipe]) -> None:
    """Whatever some step sees lies in a listed tile; every step sees all of a full one."""
    layout = CASES["many tiles"].layout()
    views = StepViews(rule(FLEX), layout, layout.length - 1, width=768, static=True)
    for kind, view in views.by_kind.items():
        mask = view.block_mask
        assert mask is not None and not view.tiles
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        some = full | listed(mask.kv_num_blocks, mask.kv_indices)
        n_queries = mask.seq_lengths[0]
        full, some = (tiles.repeat_interleave(TILE, 1)[:, :n_queries] for tiles in (full, some))
        full, some = (tiles.repeat_interleave(TILE, 2) for tiles in (full, some))
        assert 0 < int(some.sum()) < some.numel()
        row, query, key = torch.meshgrid(*map(torch.arange, some.shape), indexing="ij")
        for step in range(layout.length - 1):
            views.move_to(torch.tensor([step]))
            seen = mask.mask_mod(row, row, query, key)
            exists = layout.blocks.exists.repeat_interleave(layout.n_samples, dim=1)
            visible = expected(views.recipe, kind, layout, step)[..., : layout.document_width]
            assert torch.equal(seen[..., : layout.document_width][exists], visible[exists])
            assert not (seen & ~some)[exists].any()
            assert not (full & ~seen).any()


def listed(counts: Tensor | None, indices: Tensor | None) -> Tensor:
    """(B, 1, q) counts and (B, 1, q, c) indices -> (B, q, c) bool, which tiles are listed."""
    assert counts is not None and indices is not None
    tiles = torch.zeros(indices[:, 0].shape, dtype=torch.bool)
    first = torch.arange(indices.shape[3]) < counts[:, 0, :, None]
    return tiles.scatter(2, indices[:, 0].long(), first)
