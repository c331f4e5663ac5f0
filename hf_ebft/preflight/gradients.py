"""Gradients of single documents: of the EBFT loss, and of the cross-entropy.

The gradients are those of training: in training mode, in the trainer's precision, with the rollouts
and rewards of its subclass, and for trainable weights only. Of each gradient, only a vector of
bounded size is kept (`hf_ebft.preflight.sketch`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ebft.objective.losses import cross_entropy
from hf_ebft.objective.noise_scale import gradient_products
from hf_ebft.packed.log_probs import document_log_probs
from hf_ebft.preflight.budget import Deadline
from hf_ebft.preflight.documents import FEWEST_ROWS, Batch
from hf_ebft.preflight.sketch import GradientSketch
from hf_ebft.trainer import EBFTTrainer

# Host memory for the vectors of all documents, both kinds together.
MOST_BYTES = 2**30
# Keeps small float16 gradients from underflow. Results depend on ratios of products only.
_SCALE_OF_FLOAT16 = 2.0**12


@dataclass(frozen=True)
class Products:
    """Dot products of the gradients of N documents.

    Attributes:
        ebft, cross_entropy: (N, N), gradients of one kind with each other.
        cross: (N, N), gradients of EBFT with those of the cross-entropy.
        n_weights: number of entries of a gradient.
        size: number of values that are kept of it; equal to `n_weights` if products are exact.
    """

    ebft: Tensor
    cross_entropy: Tensor
    cross: Tensor
    n_weights: int
    size: int


def measure_products(
    trainer: EBFTTrainer,
    batches: Sequence[Batch],
    deadline: Deadline,
    *,
    most_bytes: int = MOST_BYTES,
) -> Products:
    """Products of the gradients of as many rows as there is time for, at least `FEWEST_ROWS`.

    Args:
        trainer: a stand-in.
        batches: batches of one row each.
        deadline: no further row is begun after it.
        most_bytes: largest number of bytes for the kept vectors.
    """
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    most = max(1, most_bytes // (2 * 4 * len(batches)))
    sketch = GradientSketch(weights, most, trainer.args.seed)
    kept = torch.zeros(2, len(batches), sketch.size)
    trainer.model.train()
    count = 0
    for row, batch in enumerate(batches):
        if row >= FEWEST_ROWS and deadline.passed:
            break
        _backward(trainer, policy_loss(trainer, batch))
        kept[0, row] = sketch.take()
        _backward(trainer, text_loss(trainer, batch))
        kept[1, row] = sketch.take()
        count = row + 1
    products = gradient_products(kept[:, :count].flatten(0, 1))
    return Products(
        ebft=products[:count, :count],
        cross_entropy=products[count:, count:],
        cross=products[:count, count:],
        n_weights=sketch.n_weights,
        size=sketch.size,
    )


def policy_loss(trainer: EBFTTrainer, batch: Batch) -> Tensor:
    """The policy-gradient loss of a batch, without cross-entropy and KL penalty (a scalar)."""
    alone = copy.copy(trainer)
    alone.ebft = copy.copy(trainer.ebft)
    for name, value in {"rl_coef": 1.0, "ce_coef": 0.0, "kl_coef": 0.0}.items():
        setattr(alone.ebft, name, value)
        setattr(alone.ebft, f"{name}_schedule", "constant")
        setattr(alone.ebft, f"{name}_final", None)
    with trainer.accelerator.autocast():
        loss = alone.compute_loss(trainer.model, batch)
    assert isinstance(loss, Tensor)
    return loss


def text_loss(trainer: EBFTTrainer, batch: Batch) -> Tensor:
    """The cross-entropy of a batch as in the loss (a scalar), by one pass over the text."""
    documents = trainer.document_reader.read(batch)
    model: nn.Module = trainer.model
    with trainer.accelerator.autocast():
        log_probs = document_log_probs(
            model, trainer._forward, documents, chunk_size=trainer.ebft.log_prob_chunk_size
        )
        return cross_entropy(log_probs, documents)


def _backward(trainer: EBFTTrainer, loss: Tensor) -> None:
    scale = _SCALE_OF_FLOAT16 if trainer.args.fp16 else 1.0
    # The backward pass may run forward passes of rollouts (hf_ebft.packed.deferred).
    with trainer.accelerator.autocast():
        (scale * loss).backward()
