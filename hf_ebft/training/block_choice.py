"""Leaves out blocks at random, mostly blocks that would give a small gradient.

If the policy is certain of what follows, and right, its rollouts equal the truth and their
advantages are almost zero, but their tokens cost as much as others. A block is kept with a
probability that grows with the cross-entropy of its ground-truth window, and is then weighted by
the inverse of that probability. So the expected gradient does not change (D. G. Horvitz and D. J.
Thompson, 1952).

Dimension letters: B rows, K blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_ebft.packed.forward import PackedForward, evaluation_mode
from hf_ebft.packed.log_probs import document_log_probs
from hf_ebft.rows.buckets import EXACT, Buckets
from hf_ebft.rows.layout import PackedLayout

# No block is kept with less than this times the average probability. Otherwise the weight of an
# unlikely block, the inverse of its probability, could outweigh all others.
LEAST = 0.2
# Bisection steps in the search for the scale of the probabilities: more than float32 can resolve.
HALVINGS = 40


def choose_blocks(
    model: nn.Module,
    forward: PackedForward,
    layout: PackedLayout,
    share: float,
    *,
    generator: torch.Generator,
    chunk_size: int,
    counts: Buckets = EXACT,
) -> PackedLayout:
    """Choose a random share of a batch's blocks, by one pass over the documents without gradient.

    Args:
        model: the policy.
        forward: its forward pass over packed rows.
        layout: the batch with all of its blocks.
        share: average share of the blocks to keep.
        generator: random numbers of the choice, on the batch's device.
        chunk_size: number of tokens whose logits exist at once.
        counts: K is rounded up to one of these.

    Returns:
        The layout with the chosen blocks and their weights.
    """
    with evaluation_mode(model):
        log_probs = document_log_probs(model, forward, layout.documents, chunk_size=chunk_size)
    rows = torch.arange(len(log_probs), device=log_probs.device)[:, None, None]
    loss = -log_probs[rows, layout.window].sum(dim=-1)
    probability = keep_probabilities(loss, layout.blocks.exists, share)
    drawn = torch.rand(probability.shape, generator=generator, device=generator.device)
    blocks = layout.blocks.thinned(drawn < probability, probability, counts)
    return PackedLayout(layout.documents, blocks, layout.n_samples, layout.length)


def keep_probabilities(loss: Tensor, exists: Tensor, share: float) -> Tensor:
    """Probabilities of keeping blocks: proportional to the square root of their loss, bounded.

    If the variance of a block's gradient is proportional to its loss, this choice has the least
    variance at a given cost (J. Neyman, 1934).

    Args:
        loss: (B, K), cross-entropy of the windows, in nats.
        exists: (B, K), whether each block exists.
        share: mean of the probabilities.

    Returns:
        (B, K), between `LEAST * share` and 1; 0 for blocks that do not exist.
    """
    size = loss.clamp(min=0).sqrt()

    def probabilities(scale: Tensor) -> Tensor:
        return torch.where(exists, (scale * size).clamp(LEAST * share, 1.0), 0.0)

    count = exists.sum().clamp(min=1)
    low = torch.zeros((), device=loss.device)
    high = 1 / torch.where(exists, size, torch.inf).amin().clamp(min=1e-6)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = probabilities(middle).sum() / count >= share
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return probabilities(high)
