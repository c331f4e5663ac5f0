"""How many blocks of a batch go through a model at a time.

With the documents in a cache, the rollouts of one block do not need those of another. A forward
pass over them can be made in chunks that are large enough for efficient matrix products, and the
activations of one chunk exist at a time.
"""

from __future__ import annotations

from itertools import pairwise

from hf_ebft.rows.layout import PackedLayout

# Rollout tokens that go through a model together.
CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}


def block_chunks(layout: PackedLayout, size: int | None, *, tokens_fed: int) -> tuple[slice, ...]:
    """Cut the K blocks into chunks of about the same size.

    Args:
        layout: the batch.
        size: rollout tokens of a chunk, at least those of one block; None: by the device.
        tokens_fed: of the G tokens of a rollout, how many go through the model.
    """
    rows, n_samples, n_blocks, _ = layout.rollout_shape
    if size is None:
        size = CHUNK_TOKENS["cpu" if layout.blocks.exists.device.type == "cpu" else "cuda"]
    tokens = rows * n_samples * n_blocks * tokens_fed
    n_chunks = min(n_blocks, max(1, -(-tokens // size)))
    bounds = [index * n_blocks // n_chunks for index in range(n_chunks + 1)]
    return tuple(slice(*pair) for pair in pairwise(bounds))
