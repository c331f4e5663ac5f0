"""Attention in two parts equals attention over all keys at once, and shows what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ebft.packed import step_attention
from hf_ebft.packed.attention_functions import HIDDEN, attend_plainly
from hf_ebft.packed.step_attention import DocumentTile, StepView, fused_attention_works
from tests.support.inductor import sizes_written

B, H, A, M, S, OWN, E = 2, 2, 6, 5, 11, 4, 16


def dense(
    query: Tensor,
    document: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor],
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One softmax over all a query sees, query by query, in double precision: (B, M, A, F)."""
    result = torch.zeros(B, M, A, document[1].shape[3], dtype=torch.float64)
    for row in range(B):
        for rollout in range(M):
            for head in range(A):
                shared = head // (A // H)
                keys, values = (
                    torch.cat([of_document[row, shared], of_own[row, rollout, shared]]).double()
                    for of_document, of_own in zip(document, own, strict=True)
                )
                scores = keys @ query[row, head, rollout].double() * 0.3
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                bias = [biases[0][row, 0, rollout], biases[1].view(B, M, OWN)[row, rollout]]
                scores = scores + torch.cat(bias).double()
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head, None].double()])
                    values = torch.cat([values, torch.zeros_like(values[:1])])
                result[row, rollout, head] = scores.softmax(0) @ values
    return result


@pytest.fixture(params=["fused", "plain"])
def fused(request: pytest.FixtureRequest) -> bool:
    if request.param == "fused" and not fused_attention_works():
        pytest.skip("this PyTorch has no fused attention for CPUs that serves")
    return bool(request.param == "fused")


@pytest.mark.parametrize("value_width", [E, 8])
@pytest.mark.parametrize("n_tiles", [1, 2])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_two_parts_equal_one(
    fused: bool, value_width: int, n_tiles: int, softcap: float | None, with_sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, generator=generator)

    query = random(B, M, A, E).transpose(1, 2)  # as models have it
    document = random(B, H, S, E), random(B, H, S, value_width)
    own = random(B, M, H, OWN, E), random(B, M, H, OWN, value_width)
    hidden = torch.rand(B, 1, M, S, generator=generator) < 0.5
    hidden[:, :, 2] = True  # a window that has left the document behind
    own_hidden = torch.rand(B * M, 1, 1, OWN, generator=generator) < 0.5
    own_hidden[..., 0] = False
    biases = hidden * HIDDEN, own_hidden * HIDDEN
    sinks = random(A) if with_sinks else None
    bounds = [(0, M)] if n_tiles == 1 else [(0, 3), (3, M)]
    tiles = [
        DocumentTile(slice(*bound), slice(0, S), biases[0][:, :, slice(*bound)]) for bound in bounds
    ]
    found = step_attention.step_attention(
        query,
        document,
        own,
        StepView(tuple(tiles), biases[1], fused=fused),
        0.3,
        softcap=softcap,
        sinks=sinks,
    )
    expected = dense(query, document, own, biases, softcap, sinks)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_sums_in_place_of_products_attend_as_well(softcap: float | None) -> None:
    """What a compiler gets for the rollouts' own keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(B * M, heads, tokens, width, generator=generator)
        for heads, tokens, width in ((A, 1, E), (H, OWN, E), (H, OWN, 8))
    )
    bias = (torch.rand(B * M, 1, 1, OWN, generator=generator) < 0.5) * HIDDEN
    parts = (query, key, value, bias)
    found = step_attention._attend_by_sums(*parts, False, 0.3, softcap)
    for ours, theirs in zip(found, attend_plainly(*parts, 0.3, softcap), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot", [2, torch.tensor([2])], ids=["number", "tensor"])
def test_what_is_fed_lies_in_its_slot_and_nowhere_else(
    slot: int | Tensor, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(B, H, M, width, generator=generator) for width in (E, 8))
    own = torch.ones(B, M, H, OWN, E, dtype=dtype), torch.ones(B, M, H, OWN, 8, dtype=dtype)
    step_attention.put_into_slots(own, key, value, slot)
    for slots, states in zip(own, (key, value), strict=True):
        expected = torch.ones_like(slots)
        expected[:, :, :, 2] = states.transpose(1, 2).to(dtype)
        assert torch.equal(slots, expected)


@pytest.mark.slow
def test_compiled_it_writes_slots_in_place_and_products_of_queries_and_keys_nowhere() -> None:
    """With many slots, of which one is written: no copy of them, and nothing larger than scores."""
    slots, generator = 64, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def own_part() -> tuple[tuple[Tensor, Tensor], list[Any]]:
        generator.manual_seed(1)
        own = random(B, M, H, slots, E), random(B, M, H, slots, E)
        fed = random(B, H, M, E), random(B, H, M, E), torch.tensor([5])
        documents = random(B, M, A, E), random(B, M, A)
        return own, [fed, torch.zeros(1, 1, 1, slots), False, *documents, 0.3, None, None]

    query, (own, rest), (other, same) = random(B, A, M, E), own_part(), own_part()
    found, sizes = sizes_written(step_attention._with_own, query, own, *rest)
    assert max(sizes) <= B * M * A * slots < own[0].numel()
    expected = step_attention._with_own(query, other, *same)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))


def test_half_precision_loses_what_it_rounds_and_no_more(fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(B, A, M, E, generator=generator).bfloat16()
    document = torch.randn(2, B, H, S, E, generator=generator).bfloat16()
    own = torch.randn(2, B, M, H, OWN, E, generator=generator).bfloat16()
    biases = torch.zeros(B, 1, M, S), torch.zeros(B * M, 1, 1, OWN)
    view = StepView((DocumentTile(slice(0, M), slice(0, S), biases[0]),), biases[1], fused=fused)
    parts = (document[0], document[1]), (own[0], own[1])
    found = step_attention.step_attention(query, *parts, view, 0.3)
    assert found.dtype == torch.bfloat16
    expected = dense(query, *parts, biases, None, None)
    # Scores of up to 4 with 8 bits are off by 2^-7 at most; so are weights, and values are of
    # size 1. The output is rounded as well.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2.0**-6)


def test_whether_fused_attention_works_can_be_asked_in_autocast() -> None:
    """In a process that asks there first, as measurements in mixed precision do."""
    fused_attention_works.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_attention_works()


def test_the_fused_operator_is_not_taken_where_it_gives_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fused_attention_works()
    fused_attention_works.cache_clear()
    monkeypatch.setattr(
        step_attention,
        "attend_plainly",
        lambda *args: tuple(part + 1e-3 for part in attend_plainly(*args)),
    )
    try:
        assert not fused_attention_works()
    finally:
        fused_attention_works.cache_clear()


def test_scores_of_rounded_tensors_are_not_rounded_again() -> None:
    """Products of bfloat16 numbers in float32; rounded, they would move the sum by 1e-2."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        (2 * torch.randn(2, heads, 40, 64, generator=generator)).bfloat16() for heads in (4, 2, 2)
    )
    bias = torch.zeros(1, 1, 40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), HIDDEN)
    output, lse = attend_plainly(query, key, value, bias, 64**-0.5)
    wide = query.double(), key.double().repeat_interleave(2, 1), value.double()
    scores = wide[0] @ wide[1].transpose(2, 3) * 64**-0.5 + bias.double()
    expected = scores.softmax(-1) @ wide[2].repeat_interleave(2, 1)
    torch.testing.assert_close(
        lse.double(), scores.logsumexp(-1).transpose(1, 2), atol=1e-5, rtol=0
    )
    # What is left: weights and results in bfloat16.
    error = (output.transpose(1, 2).double() - expected).norm() / expected.norm()
    assert output.dtype == torch.bfloat16 and error < 4e-3
