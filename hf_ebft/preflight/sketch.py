"""Compresses gradients, so that the gradient of every document can be kept.

Signal, noise and cosine need only dot products of gradients. A short gradient is kept unchanged,
and its products are exact. A longer one is folded into M numbers with random signs, which are the
same for all documents (M. Charikar, K. Chen, M. Farach-Colton, "Finding frequent items in data
streams", 2002; K. Weinberger et al., "Feature hashing for large scale multitask learning", 2009):

    f_b = sum of s_i g_i over all i with i mod M = b

With independent signs, the product of two such vectors has the mean g . g'. Its standard deviation
is at most sqrt(2 / M) |g| |g'| if no entry dominates: 0.1 % for two million numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hf_ebft.packed.sampling import make_generator
from hf_ebft.training.random_streams import Stream


def fold(values: Tensor, into: Tensor, offset: int) -> None:
    """Add entry i of a vector to place (offset + i) mod M of another one, in place.

    Args:
        values: (P,).
        into: (M,).
        offset: of the first entry.
    """
    size = len(into)
    first = offset % size
    head = values[: size - first]
    into[first : first + len(head)] += head
    rest = values[len(head) :]
    whole = len(rest) // size * size
    if whole:
        into += rest[:whole].view(-1, size).sum(dim=0)
    into[: len(rest) - whole] += rest[whole:]


class GradientSketch:
    """Turns the gradients of a model's trainable weights into one vector.

    Args:
        weights: the trainable weights.
        most: M, the number of entries of a vector; if there are fewer weights, their number.
        seed: seed of the signs.

    Attributes:
        n_weights: P, the number of entries of a gradient.
        size: number of entries of a vector.
        exact: whether products of vectors equal those of the gradients.
    """

    def __init__(self, weights: Iterable[nn.Parameter], most: int, seed: int = 0) -> None:
        self._weights: Sequence[nn.Parameter] = list(weights)
        self._seed = seed
        self.n_weights = sum(weight.numel() for weight in self._weights)
        self.size = min(self.n_weights, most)
        self.exact = self.size == self.n_weights

    def take(self) -> Tensor:
        """Compress the gradients of the weights to (size,) float32 on the CPU, and clear them.

        A missing gradient counts as zero.
        """
        device = self._weights[0].device
        sketch, offset = torch.zeros(self.size, device=device), 0
        for number, weight in enumerate(self._weights):
            if weight.grad is not None:
                gradient = weight.grad.detach().to(device, torch.float32).flatten()
                signed = gradient if self.exact else gradient * self._signs(number, gradient)
                fold(signed, sketch, offset)
                weight.grad = None
            offset += weight.numel()
        return sketch.cpu()

    def _signs(self, number: int, gradient: Tensor) -> Tensor:
        """(P,) of -1 and 1, the same at every call."""
        generator = make_generator(gradient.device, self._seed, Stream.SKETCH, number)
        heads = torch.randint(
            2, gradient.shape, generator=generator, device=gradient.device, dtype=torch.int8
        )
        return 2 * heads - 1
