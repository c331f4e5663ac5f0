"""What the comparison of log-probs accepts and refuses, on numbers made up for it."""

import math

import pytest
import torch

pytest.importorskip("trl")

from hf_ebft.structured.vllm.answers import Completion
from hf_ebft.structured.vllm.errors import VLLMServerError
from hf_ebft.structured.vllm.handshake import (
    PROBE_TOKENS,
    TOLERANCES,
    Scored,
    choose_rollouts,
    choose_tolerance,
    require_own_rollouts,
    score,
    weights_took_effect,
)
from tests.support.fake_vllm import small_policy
from tests.support.plain_forwards import plain_log_probs

BFLOAT16 = 0.1
ROUNDING = 0.02
"""Mean difference that rounding alone makes in bfloat16."""


def noise(seed, size=ROUNDING):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PROBE_TOKENS, generator=generator, dtype=torch.float64) * size * 1.25


def scored(server, policy, tokens=None):
    tokens = list(range(PROBE_TOKENS)) if tokens is None else tokens
    return Scored(tokens, server, policy, policy)


BASE = torch.full((PROBE_TOKENS,), -3.0, dtype=torch.float64)


def moved_by(size):
    return torch.linspace(-1, 1, PROBE_TOKENS, dtype=torch.float64) * 2 * size


@pytest.mark.parametrize("seed", range(20))
def test_a_server_that_follows_passes_however_the_rounding_falls(seed):
    for size in (0.0, 0.01, 0.05, 0.09, 0.5):
        before = scored(BASE + noise(4 * seed), BASE + noise(4 * seed + 1))
        after = BASE + moved_by(size)
        now = scored(after + noise(4 * seed + 2), after + noise(4 * seed + 3))
        followed = weights_took_effect(before, now, BFLOAT16, "x")
        if size in (0.0, 0.5):
            assert followed == (size == 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_a_policy_that_moved_by_rounding_alone_says_nothing_about_the_server(seed):
    server = BASE + noise(3 * seed)
    before = scored(server, BASE + noise(3 * seed + 1))
    now = scored(server, BASE + noise(3 * seed + 2))  # the same to the last bit
    assert not weights_took_effect(before, now, BFLOAT16, "x")


@pytest.mark.parametrize("seed", range(20))
def test_a_server_that_stands_still_is_noticed_below_the_tolerance(seed):
    server = BASE + noise(3 * seed, 0.005)
    before = scored(server, BASE + noise(3 * seed + 1, 0.005))
    now = scored(server, BASE + moved_by(0.05) + noise(3 * seed + 2, 0.005))
    assert now.mean < BFLOAT16
    with pytest.raises(VLLMServerError, match=r"changed by 0\.0[45]\d* nats.* the server's by 0"):
        weights_took_effect(before, now, BFLOAT16, "x")


def test_other_tokens_are_an_effect():
    before = scored(BASE, BASE)
    now = scored(BASE, BASE + 0.05, tokens=[7] * PROBE_TOKENS)
    assert weights_took_effect(before, now, BFLOAT16, "x")


def test_the_first_and_the_last_rollout_are_always_checked():
    for count in range(1, 40):
        for limit in range(1, min(count, 6) + 1):
            chosen = choose_rollouts(count, limit)
            assert len(set(chosen)) == len(chosen) == limit
            assert chosen[-1] == count - 1 and (limit == 1 or chosen[0] == 0)


def test_few_tokens_are_allowed_a_wider_mean():
    one = Scored([3], torch.tensor([-1.0]), torch.tensor([-1.39]), torch.tensor([-1.39]))
    require_own_rollouts(one, BFLOAT16, full_weights=True)
    with pytest.raises(VLLMServerError, match="only one run at a time can use vllm_full_sync"):
        require_own_rollouts(Scored.joined([one] * 2), BFLOAT16, full_weights=True)
    with pytest.raises(VLLMServerError, match="changes the base model under all adapters"):
        require_own_rollouts(Scored.joined([one] * 2), BFLOAT16, full_weights=False)


def test_scores_are_those_of_a_plain_forward_pass():
    model = small_policy()
    prompt, tokens = [5, 6, 7], [11, 12, 13, 14]
    completion = Completion(tokens, [-2.0, -3.0, -4.0, -5.0], "length")
    found = score(model, torch.device("cpu"), prompt, completion, 0.7)
    expected = plain_log_probs(model, prompt, tokens, 0.7)
    torch.testing.assert_close(found.policy, expected, atol=1e-6, rtol=0)
    raw = plain_log_probs(model, prompt, tokens, 1.0)
    torch.testing.assert_close(found.policy_raw, raw, atol=1e-6, rtol=0)
    difference = (expected - torch.tensor(completion.log_probs)).abs()
    assert math.isclose(found.mean, difference.mean().item(), abs_tol=1e-6)
    assert math.isclose(found.largest, difference.max().item(), abs_tol=1e-6)
    first = score(model, torch.device("cpu"), prompt, completion.beginning(2), 0.7)
    torch.testing.assert_close(first.policy, expected[:2], atol=1e-6, rtol=0)


def test_tolerance_follows_the_coarsest_precision():
    model = small_policy()
    assert choose_tolerance(model, False, False, "auto", None) == TOLERANCES[torch.float32]
    assert choose_tolerance(model, True, False, "auto", None) == TOLERANCES[torch.bfloat16]
    assert choose_tolerance(model, False, True, "auto", None) == TOLERANCES[torch.float16]
    assert choose_tolerance(model, False, False, "bfloat16", None) == TOLERANCES[torch.bfloat16]
    half = small_policy().to(torch.float16)
    assert choose_tolerance(half, False, False, "float32", None) == TOLERANCES[torch.float16]
    assert choose_tolerance(half, False, False, "float32", 0.7) == 0.7
