"""Regressions of tokens and the advantages made with them, against definitions by plain loops.

That they leave the expected gradient as it is, is shown by enumeration in test_estimator.py.
"""

import pytest
import torch
from torch import Tensor

from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.fitted import Moments, TokenKnowledge, fitted_advantages
from hf_ebft.objective.rewards import feature_matching_rewards

B, N, K, G, D, R = 2, 3, 2, 4, 6, 5


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return unit(B, N, K, D), unit(B, K, D)


@pytest.fixture
def knowledge() -> TokenKnowledge:
    torch.manual_seed(1)
    return TokenKnowledge(*(torch.randn(B, N, K, G, R) for _ in range(3)))


def test_without_regressions_every_token_gets_the_reward(
    features: tuple[Tensor, Tensor], knowledge: TokenKnowledge
) -> None:
    for alignment, diversity in ((1.0, 1.0), (0.7, 0.2), (1.0, 0.0)):
        coefficients = {"alignment_coef": alignment, "diversity_coef": diversity}
        rewards = feature_matching_rewards(*features, use_whitening=False, **coefficients)
        expected = compute_advantages(rewards, "reinforce")[..., None].expand(B, N, K, G)
        found = fitted_advantages(*features, knowledge, None, **coefficients)
        torch.testing.assert_close(found, expected)
        zero = torch.zeros(G, 2 * R + 1, D)
        found = fitted_advantages(*features, knowledge, zero, **coefficients)
        torch.testing.assert_close(found, expected)


def test_advantages_equal_their_definition(
    features: tuple[Tensor, Tensor], knowledge: TokenKnowledge
) -> None:
    x, y = features
    w = torch.randn(G, 2 * R + 1, D)
    of_states, of_tokens, constant = w[:, :R], w[:, R:-1], w[:, -1]
    found = fitted_advantages(x, y, knowledge, w, alignment_coef=0.9, diversity_coef=0.4)
    s, g, mean = knowledge.states, knowledge.tokens, knowledge.expected

    def luck(b: int, j: int, k: int, u: int) -> Tensor:
        return (g[b, j, k, u] - mean[b, j, k, u]) @ of_tokens[u]

    for b, j, k in ((0, 0, 0), (1, 2, 1), (0, 1, 1)):
        freed = [x[b, i, k] - sum(luck(b, i, k, u) for u in range(G)) for i in range(N) if i != j]
        direction = 0.9 * y[b, k] - 0.4 * torch.stack(freed).mean(dim=0)
        for t in range(G):
            later = sum((luck(b, j, k, u) for u in range(t + 1, G)), torch.zeros(D))
            baseline = s[b, j, k, t] @ of_states[t] + mean[b, j, k, t] @ of_tokens[t] + constant[t]
            expected = 2 * (x[b, j, k] - later - baseline) @ direction
            torch.testing.assert_close(found[b, j, k, t], expected, rtol=1e-4, atol=1e-4)


def test_a_single_rollout_is_refused(knowledge: TokenKnowledge) -> None:
    with pytest.raises(ValueError, match="set it to 2 or more"):
        fitted_advantages(unit(B, 1, K, D), unit(B, K, D), knowledge, None)


def filled(regressors: Tensor, features: Tensor) -> Moments:
    moments = Moments.zeros(regressors.shape[1], regressors.shape[2], features.shape[1], "cpu")
    for some in zip(regressors.split(30), features.split(30), strict=True):
        moments.add(*some)
    return moments


def test_regressions_equal_least_squares_on_a_table_with_the_penalty_as_rows() -> None:
    """The textbook form of ridge regression: extra rows of sqrt(penalty), the constant's free."""
    torch.manual_seed(2)
    z = torch.cat([torch.randn(100, G, 4) * 2, torch.ones(100, G, 1)], dim=-1)
    x = torch.randn(100, D)
    strength = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    found = filled(z, x).solve(strength)
    for t in range(G):
        rows = z[:, t].double()
        scale = rows[:, :-1].square().sum() / 4 / 100
        extra = torch.diag(torch.tensor([1.0, 1, 1, 1, 0]) * (strength[t] * scale).sqrt())
        target = torch.cat([x, torch.zeros(5, D)]).double()
        expected = torch.linalg.lstsq(torch.cat([rows, extra.double()]), target).solution
        torch.testing.assert_close(found[t].double(), expected, rtol=1e-4, atol=1e-5)


def test_error_is_that_of_predictions() -> None:
    torch.manual_seed(3)
    z, x, w = torch.randn(50, G, 5), torch.randn(50, D), torch.randn(G, 5, D)
    expected = (torch.einsum("ngf,gfd->ngd", z, w) - x[:, None]).square().sum(dim=(0, 2))
    found = filled(z, x).error(w) + x.square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_earlier_moments_have_less_weight() -> None:
    torch.manual_seed(4)
    z, x = torch.randn(2, 20, G, 5), torch.randn(2, 20, D)
    both = filled(z[0], x[0]).plus(filled(z[1], x[1]), decay=0.25)
    weighed = filled(torch.cat([0.5 * z[0], z[1]]), torch.cat([0.5 * x[0], x[1]]))
    for found, expected in zip(both.parts[:2], weighed.parts[:2], strict=True):
        torch.testing.assert_close(found, expected)
    assert float(both.count) == 25
