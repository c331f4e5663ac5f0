"""Leaving out blocks at random: those that have little to teach, most of the time.

Where the policy is sure of what follows, and right, its rollouts equal the truth and their
advantages are next to nothing; their tokens cost as much as any others. A block is kept with a
probability that grows with the cross-entropy of its ground-truth window, and then weighs by the
inverse, so that the expected gradient stays what it is (D. G. Horvitz and D. J. Thompson, 1952).

Dimension letters: B rows, K blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_ebft.packed.forward import PackedForward, evaluation_mode
from hf_ebft.packed.log_probs import document_log_probs
from hf_ebft.rows.buckets import EXACT, Buckets
from hf_ebft.rows.layout import PackedLayout

# No block is left out more often than this times as often as the average one: an unlucky block must
# not come with a weight that drowns all others.
LEAST = 0.2
# Halvings in the search for the scale of the probabilities: far below float32's resolution.
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
    """The batch with a share of its blocks: one pass over the documents, without gradient.

    Args:
        model: the policy.
        forward: how it runs packed rows.
        layout: the batch with all of its blocks.
        share: of the blocks that are kept, on average.
        generator: of the choice, on the batch's device.
        chunk_size: rows of logits that exist at once.
        counts: K is rounded up to one of these.
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
    """Probabilities of keeping blocks, proportional to the root of their loss within bounds.

    With noise in proportion to the loss, this is the choice of least noise at given cost (J.
    Neyman, 1934).

    Args:
        loss: (B, K), cross-entropy of the windows, in nats.
        exists: (B, K), which blocks there are.
        share: their mean.

    Returns:
        (B, K), between `LEAST * share` and 1; 0 where there is no block.
    """
    size = loss.clamp(min=0).sqrt()

    def at(scale: Tensor) -> Tensor:
        return torch.where(exists, (scale * size).clamp(LEAST * share, 1.0), 0.0)

    count = exists.sum().clamp(min=1)
    low = torch.zeros((), device=loss.device)
    high = 1 / torch.where(exists, size, torch.inf).amin().clamp(min=1e-6)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = at(middle).sum() / count >= share
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return at(high)
