"""Block masks by arithmetic are those of the definition, tile by tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import hf_ebft.packed.block_masks
from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.masks import CHUNKED, FULL, SLIDING, SPLIT, MaskRecipe
from hf_ebft.packed.split_attention import split_attention
from hf_ebft.rows.layout import PackedLayout, PackedPart
from tests.support.architectures import WINDOW
from tests.support.exactness import Case, packed_documents, ragged_batch

KINDS = (FULL, SLIDING, CHUNKED)
CASES = {
    "ragged": Case(ragged_batch(33, 21, 5), stride=6),
    "left padded": Case(ragged_batch(26, 19, left=True), stride=2, n_samples=3),
    "packed documents": Case(packed_documents([15, 9, 4], [20]), stride=4, context_length=1),
    "one token a rollout": Case(ragged_batch(17, 12), stride=3, generate_max_len=1),
    "no blocks": Case(ragged_batch(6, 4), context_length=8),
    # Several tiles of 128, some of them seen wholly.
    "long": Case(ragged_batch(190, 60), stride=8, generate_max_len=6, n_samples=4),
}


def recipe(implementation: str = FLEX) -> MaskRecipe:
    return MaskRecipe(
        implementation, KINDS, by_layer_type=True, window=WINDOW, chunk=5, dtype=torch.float32
    )


def parts(layout: PackedLayout) -> dict[str, PackedPart]:
    """Every part of the row that a pass feeds, and three chunks of its blocks, one filled up."""
    steps = {f"step {step}": layout.step_part(step) for step in range(layout.length - 1)}
    middle = layout.rollout_shape[2] // 2
    chunks = {
        f"blocks {half}": layout.select_blocks(half).rollouts_part
        for half in (slice(0, middle), slice(middle, None))
        if layout.blocks.exists[:, half].shape[1] > 0
    }
    beyond = layout.select_blocks(slice(middle, middle + 9))
    chunks["filled up"] = beyond.predicting_rollouts_part
    return {
        "document": layout.document_part,
        "row": layout.row_part,
        "predicting": layout.predicting_part,
        "predicting rollouts": layout.predicting_rollouts_part,
        **steps,
        **chunks,
    }


def tiles_of(dense: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(B, q, c) bool: tiles of (B, Q, C) with something and with everything in them."""
    _, queries, keys = dense.shape
    padded = torch.nn.functional.pad(dense, (0, -keys % size, 0, -queries % size))
    tiles = padded.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return tiles.flatten(3).any(3), tiles.flatten(3).all(3)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """(B, q, c) bool from a block mask's lists of tiles."""
    first = torch.arange(indices.shape[-1]) < counts[:, 0, :, None]
    return torch.zeros_like(first).scatter(-1, indices[:, 0].long(), first)


@pytest.mark.parametrize("size", [128, 16, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_tiles_are_those_of_the_definition(
    name: str, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty, partly and wholly seen ones, in every pass, whatever their size."""
    monkeypatch.setattr(hf_ebft.packed.block_masks, "TILE", size)
    for part in parts(CASES[name].layout()).values():
        dense = recipe("sdpa").build(part.queries, part.keys)[kind][:, 0]
        some, full = recipe().visible_keys(kind, part).tiles()
        expected_some, expected_full = tiles_of(dense, size)
        assert torch.equal(torch.from_numpy(some), expected_some)
        assert torch.equal(torch.from_numpy(full), expected_full)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_block_mask_is_the_boolean_one(name: str, kind: str) -> None:
    wholly_seen = 0
    for part in parts(CASES[name].layout()).values():
        dense = recipe("sdpa").build(part.queries, part.keys)[kind][:, 0]
        mask = recipe().block_mask(kind, part)
        some, full = tiles_of(dense, 128)
        assert torch.equal(mask.to_dense()[:, 0].bool(), some)
        assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices), full)
        assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices), some & ~full)
        # And the same seen from the keys, for the backward pass.
        partly_by_key = listed(mask.q_num_blocks, mask.q_indices)
        assert torch.equal(partly_by_key.transpose(1, 2), some & ~full)
        assert mask.seq_lengths == dense.shape[1:]
        indices = (torch.arange(length) for length in dense.shape)
        row, query, key = torch.meshgrid(*indices, indexing="ij")
        assert torch.equal(mask.mask_mod(row, torch.tensor(0), query, key), dense)
        wholly_seen += int(full.sum())
    assert (wholly_seen > 0) == (name == "long" and kind == FULL)


@pytest.mark.parametrize("kind", [FULL, SLIDING])
@pytest.mark.parametrize("name", ["packed documents", "long"])
@pytest.mark.parametrize("fed", ["row", "step 1"])
def test_flex_attention_equals_split_attention(fed: str, name: str, kind: str) -> None:
    """On a CPU there is the forward pass alone, by the mask's definition."""
    generator = torch.Generator().manual_seed(0)
    part = parts(CASES[name].layout())[fed]
    rows, n_queries = part.queries.slot.shape
    query, key, value = (
        torch.randn(rows, heads, length, 16, generator=generator)
        for heads, length in ((4, n_queries), (2, part.n_keys), (2, part.n_keys))
    )
    mask = recipe().block_mask(kind, part)
    found = flex_attention(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True)
    expected = split_attention(query, key, value, recipe(SPLIT).plan(kind, part), 0.3)
    exists = part.queries.document >= 0
    torch.testing.assert_close(
        found.transpose(1, 2)[exists], expected[exists], atol=2e-6, rtol=1e-5
    )


def test_equal_layouts_share_a_mask_and_others_do_not() -> None:
    """What was compiled for a mask serves the next batch of the same shape and boundaries."""
    case = CASES["ragged"]

    def mask(case: Case, step: int | None = None) -> object:
        layout = case.layout()
        part = layout.row_part if step is None else layout.step_part(step)
        return recipe().block_mask(SLIDING, part)

    other_tokens = ragged_batch(33, 21, 5, seed=2)
    assert mask(case) is mask(case) is mask(replace(case, batch=other_tokens))
    others = [
        mask(replace(case, batch=ragged_batch(33, 22, 5))),
        mask(replace(case, n_samples=3)),
        mask(replace(case, context_length=4)),
        mask(replace(case, generate_max_len=3)),
        mask(case, 0),
        mask(case, 1),
    ]
    assert len({id(found) for found in [mask(case), *others]}) == 7


def test_old_masks_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_ebft.packed.block_masks, "KEPT", 2)
    cache, made = hf_ebft.packed.block_masks.BlockMaskCache(), []
    for key in (1, 2, 1, 3, 1, 2):
        cache.get(key, lambda key=key: made.append(key))
    assert made == [1, 2, 3, 2]


@pytest.mark.parametrize("name", CASES)
def test_masks_on_a_device_are_made_from_numbers_of_the_host(name: str) -> None:
    """Whoever reads a value off the "meta" device, which has none, gets an error."""
    on_host, device = CASES[name].layout(), torch.device("meta")
    layout = on_host.to(device)
    chunk = slice(0, 3)
    for part, other in (
        (layout.predicting_part, on_host.predicting_part),
        (
            layout.select_blocks(chunk).rollouts_part,
            on_host.select_blocks(chunk).rollouts_part,
        ),
    ):
        mask, expected = (recipe().block_mask(SLIDING, some) for some in (part, other))
        assert mask.kv_indices.device == device and expected.kv_indices.device.type == "cpu"
        assert mask.shape == expected.shape
