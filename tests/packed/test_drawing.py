"""Drawing in few passes over the logits draws what drawing operator by operator does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_ebft.packed import drawing
from hf_ebft.packed.drawing import (
    Sampler,
    draw,
    draw_from_logits,
    token_probabilities,
    uniform_numbers,
)
from tests.support.inductor import sizes_written

# Of float32 exponentials, as a share of the whole.
ROUNDING = 1e-6


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return uniform_numbers(shape, torch.Generator().manual_seed(seed))


def random_logits(n_rows: int, vocabulary: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(vocabulary)
    return torch.randn(n_rows, vocabulary, generator=generator) * spread


def cumulated(logits: Tensor, temperature: float) -> Tensor:
    """(N, V + 1) in double precision: the probability of all tokens before each."""
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    return torch.nn.functional.pad(probabilities.cumsum(dim=-1), (1, 0))


def assert_right(logits: Tensor, uniform: Tensor, tokens: Tensor, temperature: float) -> None:
    """Every number lies in the stretch of its token, up to rounding."""
    edges = cumulated(logits, temperature)
    assert bool((edges.gather(1, tokens) <= uniform + ROUNDING).all())
    assert bool((uniform <= edges.gather(1, tokens + 1) + ROUNDING).all())


VOCABULARIES = [1, 2, 5, 64, 509, 4096, 10_007, pytest.param(128_256, marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_tokens_are_where_the_cumulated_probability_passes_the_number(
    vocabulary: int, temperature: float, dtype: torch.dtype
) -> None:
    logits, uniform = random_logits(40, vocabulary).to(dtype), numbers(40, 50)
    tokens, log_probs = draw_from_logits(logits, uniform, temperature)
    assert_right(logits, uniform, tokens, temperature)
    expected = torch.log_softmax(logits.double() / temperature, dim=-1).gather(1, tokens)
    torch.testing.assert_close(log_probs, expected.float(), rtol=1e-6, atol=1e-5)
    # And the same ones as operator by operator, but where a number lies on an edge.
    probabilities = token_probabilities(logits, temperature)
    other = draw(probabilities, uniform)
    assert_right(logits, uniform, other, temperature)
    assert float((tokens != other).float().mean()) <= 0.001


def test_a_token_too_far_would_be_noticed() -> None:
    logits, uniform = random_logits(40, 64), numbers(40, 50)
    tokens, _ = draw_from_logits(logits, uniform, 1.0)
    with pytest.raises(AssertionError):
        assert_right(logits, uniform, (tokens + 1).clamp(max=63), 1.0)


def test_the_largest_number_gives_the_last_possible_token() -> None:
    logits = random_logits(3, 100)
    logits[:, 70:] = -torch.inf
    uniform = torch.full((3, 1), drawing._JUST_BELOW_ONE, dtype=torch.float64)
    tokens, log_probs = draw_from_logits(logits, uniform, 1.0)
    assert tokens.flatten().tolist() == [69] * 3
    assert bool(log_probs.isfinite().all())
    tokens, _ = draw_from_logits(logits, torch.zeros_like(uniform), 1.0)
    assert tokens.flatten().tolist() == [0] * 3


def test_impossible_tokens_stay_impossible_whole_parts_of_them_too() -> None:
    logits = torch.full((2, 400), -torch.inf)
    logits[0, 333], logits[1, 7] = 2.0, -1e30
    tokens, log_probs = draw_from_logits(logits, numbers(2, 1000), 0.5)
    assert tokens.unique(dim=1).tolist() == [[333], [7]]
    assert torch.equal(log_probs, torch.zeros(2, 1000))


def test_parts_far_below_the_highest_are_drawn_from_rightly() -> None:
    """By numbers that a random one hardly ever is."""
    logits = torch.full((1, 10_000), -200.0)
    logits[0, 9_999] = 0.0
    before = float(cumulated(logits, 1.0)[0, 5_000])
    uniform = torch.tensor([[before + 1e-92]], dtype=torch.float64)
    tokens, _ = draw_from_logits(logits, uniform, 1.0)
    assert abs(int(tokens) - 5_000) <= 100


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_noticed(bad: float) -> None:
    """And give a token of the vocabulary."""
    logits = random_logits(2, 300)
    logits[0, 150 if bad != -torch.inf else slice(None)] = bad
    tokens, log_probs = draw_from_logits(logits, numbers(2, 20), 1.0)
    assert bool(((tokens >= 0) & (tokens < 300)).all())
    assert bool(log_probs[0].isnan().all()) and bool(log_probs[1].isfinite().all())


def test_a_sampler_on_a_gpu_draws_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with a nucleus, whose tokens have to be sorted."""
    calls: list[Tensor] = []

    def compiled(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        calls.append(logits)
        return draw_from_logits(logits, uniform, temperature)

    logits, uniform = random_logits(6, 90), numbers(2, 3, 4)
    states = logits.view(2, 3, 90)
    expected = Sampler(0.7, 1.0, 4)(states, lambda rows: rows, uniform)
    monkeypatch.setattr(drawing, "_compiled_draw", lambda: compiled)
    monkeypatch.setattr(drawing, "fuses_kernels", lambda device: True)
    found = Sampler(0.7, 1.0, 4)(states, lambda rows: rows, uniform)
    assert [len(chunk) for chunk in calls] == [4, 2]
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)
    Sampler(0.7, 0.9, 4)(states, lambda rows: rows, uniform)
    assert len(calls) == 2


@pytest.mark.slow
def test_compiled_it_writes_nothing_of_the_size_of_the_logits() -> None:
    logits, uniform = random_logits(64, 4096), numbers(64, 1)
    found, sizes = sizes_written(draw_from_logits, logits, uniform, 0.8)
    # 64 parts, and the 64 tokens of one.
    assert max(sizes) == logits.numel() // 64
    expected = draw_from_logits(logits, uniform, 0.8)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)
    # Which the form for a CPU does.
    _, sizes = sizes_written(lambda x, u: draw(token_probabilities(x, 0.8), u), logits, uniform)
    assert max(sizes) == logits.numel()
