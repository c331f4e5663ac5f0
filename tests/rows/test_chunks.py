"""Blocks are cut into chunks that cover them once, about evenly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_ebft.rows.chunks import block_chunks


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((1, 4, 126, 7), 1024, 4),  # 3528 tokens
        ((1, 4, 126, 7), 3528, 1),
        ((1, 4, 126, 7), None, 4),  # 1024 on a CPU
        ((2, 3, 5, 4), 1, 5),  # never less than a block
        ((2, 3, 5, 0), 1, 1),  # nothing to feed
        ((1, 2, 1, 8), 1, 1),
    ],
)
def test_chunks_cover_the_blocks_evenly(
    shape: tuple[int, int, int, int], size: int | None, expected: int
) -> None:
    layout: Any = SimpleNamespace(
        rollout_shape=shape, blocks=SimpleNamespace(exists=torch.ones(1, dtype=torch.bool))
    )
    chunks = block_chunks(layout, size, tokens_fed=shape[3])
    covered = [block for chunk in chunks for block in range(shape[2])[chunk]]
    assert covered == list(range(shape[2]))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert len(chunks) == expected and max(sizes) - min(sizes) <= 1
