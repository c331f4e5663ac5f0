"""How many blocks of a batch go through a model at a time.

With the documents in a cache, the rollouts of one block do not need those of another. A forward
pass over them can be made in chunks that are large enough for efficient matrix products, and the
activations of one chunk exist at a time.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from hf_ebft.rows.layout import PackedLayout

# Rollout tokens that go through a model together on a CPU.
ON_CPU = 1024
# And elsewhere, without a gradient: activations are gone after each layer.
WITHOUT_GRADIENT = 8192
# With a gradient: numbers of the hidden states of a chunk (its tokens times their width H). A layer
# takes about 72 * H floating point operations for each, forward and backward, and launches about a
# hundred operators of ten microseconds. At 400 TFLOP/s the two take as long with 2^22 numbers where
# H is 1500; with twice as many nothing waits for launches from there on, and their activations are
# about those of the documents of a batch.
NUMBERS_WITH_GRADIENT = 2**23


def tokens_without_gradient(device: torch.device) -> int:
    """Rollout tokens of a chunk whose activations nobody keeps, where nothing is set."""
    return ON_CPU if device.type == "cpu" else WITHOUT_GRADIENT


def tokens_with_gradient(device: torch.device, width: int) -> int:
    """Rollout tokens of a chunk whose activations are kept, where nothing is set.

    Args:
        device: of the model.
        width: H, of its hidden states.
    """
    if device.type == "cpu":
        return ON_CPU
    return min(WITHOUT_GRADIENT, NUMBERS_WITH_GRADIENT // width)


def block_chunks(
    layout: PackedLayout, size: int, *, tokens_fed: int, equal: bool = False
) -> tuple[slice, ...]:
    """Cut the K blocks into chunks of about the same size.

    Args:
        layout: the batch.
        size: rollout tokens of a chunk, at least those of one block.
        tokens_fed: of the G tokens of a rollout, how many go through the model.
        equal: all chunks have the same number of blocks, so that their passes have one shape; the
            last may reach beyond the last block, see `PackedLayout.select_blocks`.
    """
    rows, n_samples, n_blocks, _ = layout.rollout_shape
    tokens = rows * n_samples * n_blocks * tokens_fed
    n_chunks = min(n_blocks, max(1, -(-tokens // size)))
    if equal:
        width = -(-n_blocks // n_chunks)
        return tuple(slice(start, start + width) for start in range(0, n_blocks, width))
    bounds = [index * n_blocks // n_chunks for index in range(n_chunks + 1)]
    return tuple(slice(*pair) for pair in pairwise(bounds))
