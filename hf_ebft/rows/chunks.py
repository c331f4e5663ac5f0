"""How many blocks of a batch go through a model at a time.

If a cache holds the documents' keys and values, the rollouts of a block are independent of those of
other blocks. The forward pass over the rollouts can then be made in chunks. A chunk must be large
enough for efficient matrix products. Only one chunk's activations exist at a time.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from hf_ebft.rows.layout import PackedLayout

# Rollout tokens per chunk on a CPU.
ON_CPU = 1024
# Rollout tokens per chunk on other devices without a gradient: each layer's activations are freed
# after the layer.
WITHOUT_GRADIENT = 8192
# With a gradient: elements in the hidden states of a chunk (its tokens times their width H). For
# each element, a layer takes about 72 * H floating point operations, forward and backward. A layer
# also launches about a hundred operators of ten microseconds. At 400 TFLOP/s and H = 1500,
# computing and launching take the same time with 2^22 elements. With twice as many, computing takes
# longer than launching at this width and above, and a chunk's activations take about as much memory
# as those of a batch's documents.
NUMBERS_WITH_GRADIENT = 2**23


def tokens_without_gradient(device: torch.device) -> int:
    """Default number of rollout tokens of a chunk in a pass without gradient."""
    return ON_CPU if device.type == "cpu" else WITHOUT_GRADIENT


def tokens_with_gradient(device: torch.device, width: int) -> int:
    """Default number of rollout tokens of a chunk in a pass with gradient.

    Args:
        device: the model's device.
        width: H, the width of the model's hidden states.
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
        size: approximate number of rollout tokens of a chunk. A chunk has at least one block, even
            if that block has more tokens.
        tokens_fed: how many of the G tokens of each rollout go through the model.
        equal: give all chunks the same number of blocks, so that their passes have one shape. The
            last chunk may then end beyond the last block, see `PackedLayout.select_blocks`.

    Returns:
        Slices of the K blocks, in order.
    """
    rows, n_samples, n_blocks, _ = layout.rollout_shape
    tokens = rows * n_samples * n_blocks * tokens_fed
    n_chunks = min(n_blocks, max(1, -(-tokens // size)))
    if equal:
        width = -(-n_blocks // n_chunks)
        return tuple(slice(start, start + width) for start in range(0, n_blocks, width))
    bounds = [index * n_blocks // n_chunks for index in range(n_chunks + 1)]
    return tuple(slice(*pair) for pair in pairwise(bounds))
