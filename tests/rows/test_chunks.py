"""Blocks are cut into chunks that cover them once, about evenly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_ebft.rows.chunks import block_chunks, tokens_with_gradient, tokens_without_gradient


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((1, 4, 126, 7), 1024, 4),  # 3528 tokens
        ((1, 4, 126, 7), 3528, 1),
        ((2, 3, 5, 4), 1, 5),  # never less than a block
        ((2, 3, 5, 0), 1, 1),  # nothing to feed
        ((1, 2, 1, 8), 1, 1),
    ],
)
def test_chunks_cover_the_blocks_evenly(
    shape: tuple[int, int, int, int], size: int, expected: int
) -> None:
    layout: Any = SimpleNamespace(rollout_shape=shape)
    chunks = block_chunks(layout, size, tokens_fed=shape[3])
    covered = [block for chunk in chunks for block in range(shape[2])[chunk]]
    assert covered == list(range(shape[2]))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert len(chunks) == expected and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("n_blocks", "size", "expected"),
    [
        (8, 3 * 14, [3, 3, 3]),  # the last one is filled up
        (127, 16 * 14, [16] * 8),
        (5, 4 * 14, [3, 3]),
        (9, 14, [1] * 9),
        # Two blocks each, for which five chunks are enough.
        (9, 16, [2] * 5),
        (6, 1000, [6]),
    ],
)
def test_equal_chunks_have_one_width(n_blocks: int, size: int, expected: list[int]) -> None:
    layout: Any = SimpleNamespace(rollout_shape=(1, 2, n_blocks, 8))
    chunks = block_chunks(layout, size, tokens_fed=7, equal=True)
    assert [chunk.stop - chunk.start for chunk in chunks] == expected
    covered = [block for chunk in chunks for block in range(n_blocks)[chunk]]
    assert covered == list(range(n_blocks))


def test_tokens_of_a_chunk_where_nothing_is_set() -> None:
    """On a GPU as many as a layer's launches take, and no more than the documents at most."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert tokens_without_gradient(cpu) == tokens_with_gradient(cpu, 2048) == 1024
    assert tokens_without_gradient(cuda) == 8192
    widths = (576, 1536, 2048, 4096)
    assert [tokens_with_gradient(cuda, width) for width in widths] == [8192, 5461, 4096, 2048]
