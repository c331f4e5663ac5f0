"""Drawing tokens from logits, with random numbers that are drawn beforehand.

The drawn token is a function of the logits and of one uniform number per token. So the result does
not depend on how many rows of logits exist at once. A decoding step also draws the same tokens
whether it runs operator by operator or as a CUDA graph, because no random generator runs inside it.

Dimension letters: B rows of the batch, Q tokens of a row that are continued, N rows of logits, V
vocabulary, X width of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from hf_ebft.packed.flex import compiled, fuses_kernels
from hf_ebft.packed.heads import ToLogits
from hf_ebft.packed.token_log_probs import at_temperature

# A positive number times this is smaller than the number, by one or two units in the last place.
_JUST_BELOW_ONE = 1.0 - 2.0**-52


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn.

    Attributes:
        temperature: > 0, divides the logits.
        top_p: nucleus mass; 1.0 keeps the whole distribution.
        chunk_size: rows of logits that exist at once.
    """

    temperature: float
    top_p: float
    chunk_size: int

    def __call__(self, states: Tensor, to_logits: ToLogits, uniform: Tensor) -> list[Tensor]:
        """Draw tokens for each state.

        Args:
            states: (B, Q, X).
            to_logits: computes logits from states (N, X).
            uniform: (B, Q, each) of `uniform_numbers`, where `each` is the number of tokens to draw
                per state.

        Returns:
            The tokens, (B, Q * each) int64, and their log-probabilities before top-p truncation,
            (B, Q * each) float32.
        """
        tokens, log_probs = [], []
        chunks = states.flatten(0, 1).split(self.chunk_size)
        numbers = uniform.flatten(0, 1).split(self.chunk_size)
        for chunk, of_chunk in zip(chunks, numbers, strict=True):
            drawn, of_drawn = self._of_chunk(to_logits(chunk), of_chunk)
            tokens.append(drawn)
            log_probs.append(of_drawn)
        return [_joined(parts).view(states.shape[0], -1) for parts in (tokens, log_probs)]

    def _of_chunk(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw tokens (N, each) from logits (N, V); also return their log-probabilities."""
        if self.top_p >= 1.0 and fuses_kernels(logits.device.type):
            return _compiled_draw()(logits, uniform, self.temperature)
        probabilities = token_probabilities(logits, self.temperature)
        tokens = draw(nucleus(probabilities, self.top_p), uniform)
        return tokens, probabilities.gather(1, tokens).log()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def uniform_numbers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw float64 numbers in [0, 1) for `draw`, on the generator's device."""
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    # The threshold (number times total) must not be rounded up to the total: no cumulated
    # probability would exceed it.
    return numbers.clamp_(max=_JUST_BELOW_ONE)


def token_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax at a temperature.

    Args:
        logits: (..., V) in any floating dtype.

    Returns:
        (..., V) float32, summing to 1.
    """
    return torch.softmax(at_temperature(logits, temperature), dim=-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches `top_p`; renormalise.

    Args:
        probabilities: (..., V) float32, summing to 1.

    Returns:
        (..., V) float32, summing to 1.
    """
    if top_p >= 1.0:
        return probabilities
    descending, order = probabilities.sort(dim=-1, descending=True)
    # Total of the likelier tokens. Computed as `cumsum - descending`, rounding could keep one token
    # too many.
    mass_before = nn.functional.pad(descending.cumsum(dim=-1)[..., :-1], (1, 0))
    kept = torch.where(mass_before < top_p, descending, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens from each distribution.

    A drawn token is the first one at which the cumulated probability exceeds a uniform number. This
    takes one random number per token, while `torch.multinomial` takes one per entry of the
    vocabulary. Probabilities are summed over parts of the vocabulary. They are cumulated entry by
    entry only in the part that contains the token. Sums are in double precision, so that rare
    tokens at the end of a large vocabulary keep their probability.

    For a distribution that contains NaN, the token is arbitrary but within the vocabulary.

    Args:
        probabilities: (N, V) float32.
        uniform: (N, each) of `uniform_numbers`.

    Returns:
        (N, each) int64.
    """
    vocabulary = probabilities.shape[1]
    width = _part_width(vocabulary)
    missing = -vocabulary % width
    padded = nn.functional.pad(probabilities, (0, missing)) if missing else probabilities
    parts = padded.unflatten(1, (-1, width))
    sums = parts.sum(dim=-1, dtype=torch.float64)
    up_to_part = sums.cumsum(dim=-1)
    threshold = uniform * up_to_part[:, -1:]
    # With NaN, no comparison is true, and the search returns an index beyond the end.
    part = torch.searchsorted(up_to_part, threshold, right=True).clamp_(max=parts.shape[1] - 1)
    before_part = nn.functional.pad(up_to_part, (1, 0)).gather(1, part)
    inside = parts.gather(1, part[..., None].expand(-1, -1, width))
    inside = inside.cumsum(dim=-1, dtype=torch.float64)
    left = (threshold - before_part)[..., None]
    left = torch.minimum(left, inside[..., -1:] * _JUST_BELOW_ONE)
    token = torch.searchsorted(inside, left, right=True)[..., 0] + part * width
    return token.clamp_(max=vocabulary - 1)


def draw_from_logits(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`token_probabilities` followed by `draw`, written for a compiler.

    The compiled function reads the logits once and writes nothing of their size. Each part of the
    vocabulary has a sum of exponentials relative to its own highest score. Only these sums are
    brought to one scale. Uncompiled, it is slower than the two functions.

    If the logits of a row contain NaN, its log-probabilities are NaN.

    Args:
        logits: (N, V) in any floating dtype.
        uniform: (N, each) of `uniform_numbers`.
        temperature: > 0, divides the logits.

    Returns:
        Tokens (N, each) int64 and their log-probabilities (N, each) float32.
    """
    vocabulary = logits.shape[1]
    width = _part_width(vocabulary)
    missing = -vocabulary % width
    padded = nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
    parts = padded.unflatten(1, (-1, width))
    scores = parts.float() / temperature
    # All scores of a part may be minus infinity, and minus infinity minus itself would be NaN.
    highest = scores.amax(dim=-1).clamp(min=torch.finfo(torch.float32).min)
    sums = torch.exp(scores - highest[..., None]).sum(dim=-1, dtype=torch.float64)
    top = highest.amax(dim=-1, keepdim=True)
    scale = torch.exp((highest - top).double())
    up_to_part = (sums * scale).cumsum(dim=-1)
    total = up_to_part[:, -1:]
    threshold = uniform * total
    # The cumulated sums never decrease, so the number of sums up to the threshold is the part's
    # index.
    part = (up_to_part[:, None] <= threshold[..., None]).sum(dim=-1)
    part = part.clamp(max=parts.shape[1] - 1)
    before_part = nn.functional.pad(up_to_part, (1, 0)).gather(1, part)
    of_part = parts.gather(1, part[..., None].expand(-1, -1, width)).float() / temperature
    inside = torch.exp(of_part - highest.gather(1, part)[..., None])
    inside = inside.cumsum(dim=-1, dtype=torch.float64)
    left = ((threshold - before_part) / scale.gather(1, part))[..., None]
    left = torch.minimum(left, inside[..., -1:] * _JUST_BELOW_ONE)
    place = (inside <= left).sum(dim=-1).clamp(max=width - 1)
    score = of_part.gather(2, place[..., None])[..., 0]
    tokens = (part * width + place).clamp(max=vocabulary - 1)
    return tokens, score - top - total.log().float()


@cache
def _compiled_draw() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """The compiled `draw_from_logits`, one per process."""
    return compiled(draw_from_logits)


def _part_width(vocabulary: int) -> int:
    """Width of a part of the vocabulary: about its square root.

    A divisor of the vocabulary is preferred, because then the logits need not be padded.
    """
    root = math.isqrt(vocabulary)
    nearby = range(root, min(2 * root, vocabulary) + 1)
    return next((width for width in nearby if vocabulary % width == 0), root)
