"""Drawing tokens from logits, with random numbers that are drawn beforehand.

Which token is drawn is a function of the logits and of one uniform number per token. So it does not
matter how many rows of logits exist at once, and a step of decoding draws the same whether it runs
operator by operator or is replayed as a CUDA graph: no generator runs inside.

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

# A sum of positive numbers times this is smaller than the sum, by one or two places of rounding.
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
        """Tokens drawn for each state, and their log-probabilities before any truncation.

        Args:
            states: (B, Q, X).
            to_logits: makes logits of any of them.
            uniform: (B, Q, each) of `uniform_numbers`.

        Returns:
            (B, Q * each) int64 and float32.
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
        """Tokens (N, each) and their log-probabilities for logits (N, V)."""
        if self.top_p >= 1.0 and fuses_kernels(logits.device.type):
            return _compiled_draw()(logits, uniform, self.temperature)
        probabilities = token_probabilities(logits, self.temperature)
        tokens = draw(nucleus(probabilities, self.top_p), uniform)
        return tokens, probabilities.gather(1, tokens).log()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def uniform_numbers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Float64 numbers in [0, 1), on the generator's device, for `draw`."""
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    # A threshold made of the largest one must not be rounded to a total that none passes.
    return numbers.clamp_(max=_JUST_BELOW_ONE)


def token_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax at a temperature.

    Args:
        logits: (..., V) in any floating dtype.

    Returns:
        (..., V) float32, summing to 1.
    """
    logits = logits.float()
    return torch.softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches `top_p`, and no others.

    Args:
        probabilities: (..., V) float32, summing to 1.

    Returns:
        (..., V) float32, summing to 1.
    """
    if top_p >= 1.0:
        return probabilities
    descending, order = probabilities.sort(dim=-1, descending=True)
    # Of the likelier tokens alone: cumsum - descending would let rounding keep one token too many.
    mass_before = nn.functional.pad(descending.cumsum(dim=-1)[..., :-1], (1, 0))
    kept = torch.where(mass_before < top_p, descending, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens drawn from each distribution: (N, V) -> (N, each) int64.

    The token at which the cumulated probability first passes a uniform number: one random number
    per token, where `torch.multinomial` takes one per entry of the vocabulary. The vocabulary is
    summed in parts, and only the part that holds the token is cumulated. Sums are in double
    precision, so that rare tokens at the end of a large vocabulary keep their share.

    A distribution that holds NaN gives some token of the vocabulary.

    Args:
        probabilities: (N, V) float32.
        uniform: (N, each) of `uniform_numbers`.
    """
    vocabulary = probabilities.shape[1]
    width = _part_width(vocabulary)
    missing = -vocabulary % width
    padded = nn.functional.pad(probabilities, (0, missing)) if missing else probabilities
    parts = padded.unflatten(1, (-1, width))
    sums = parts.sum(dim=-1, dtype=torch.float64)
    up_to_part = sums.cumsum(dim=-1)
    threshold = uniform * up_to_part[:, -1:]
    # Among NaN, which no threshold is below, the search goes to the end and beyond.
    part = torch.searchsorted(up_to_part, threshold, right=True).clamp_(max=parts.shape[1] - 1)
    before_part = nn.functional.pad(up_to_part, (1, 0)).gather(1, part)
    inside = parts.gather(1, part[..., None].expand(-1, -1, width))
    inside = inside.cumsum(dim=-1, dtype=torch.float64)
    left = (threshold - before_part)[..., None]
    left = torch.minimum(left, inside[..., -1:] * _JUST_BELOW_ONE)
    token = torch.searchsorted(inside, left, right=True)[..., 0] + part * width
    return token.clamp_(max=vocabulary - 1)


def draw_from_logits(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What `token_probabilities` and `draw` do, written for a compiler.

    Compiled, it reads the logits once and writes nothing of their size: every part of the
    vocabulary has its sum of exponentials beside its own highest score, and only these sums are put
    on one scale. Operator by operator it is slower than the two functions.

    Where the logits of a row hold NaN, so do its log-probabilities.

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
    # Parts may hold nothing but impossible tokens: minus infinity less itself would be NaN.
    highest = scores.amax(dim=-1).clamp(min=torch.finfo(torch.float32).min)
    sums = torch.exp(scores - highest[..., None]).sum(dim=-1, dtype=torch.float64)
    top = highest.amax(dim=-1, keepdim=True)
    scale = torch.exp((highest - top).double())
    up_to_part = (sums * scale).cumsum(dim=-1)
    total = up_to_part[:, -1:]
    threshold = uniform * total
    # As many are passed as are no larger, since sums only grow.
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
    """One for the process."""
    return compiled(draw_from_logits)


def _part_width(vocabulary: int) -> int:
    """About the square root, a divisor if there is one nearby: then nothing has to be copied."""
    root = math.isqrt(vocabulary)
    nearby = range(root, min(2 * root, vocabulary) + 1)
    return next((width for width in nearby if vocabulary % width == 0), root)
