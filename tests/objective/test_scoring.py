"""Scores of groups: unbiased by enumeration, closed forms, and what sharpening does to each.

Dimension letters: C outcomes of a distribution, n rollouts of a group, D feature width.
"""

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from hf_ebft.objective.rewards import feature_matching_rewards
from hf_ebft.objective.scoring import cfm_loss, energy_score, excess_over_spread
from tests.support.plain_objective import plain_group, unit

Score = Callable[[Tensor, Tensor], Tensor]
SCORES: dict[str, Score] = {
    "cfm_loss": cfm_loss,
    "excess_over_spread": excess_over_spread,
    "energy_score": energy_score,
}


def exact(name: str, p: Tensor, features: Tensor, y: Tensor) -> float:
    """The definition, from the distribution: p (C,), features (C, D), y (D,)."""
    mean = p @ features
    if name == "energy_score":
        apart = (features[:, None] - features[None]).norm(dim=-1)
        return float(p @ (features - y).norm(dim=-1) - p @ apart @ p / 2)
    error, spread = (mean - y).square().sum(), p @ (features - mean).square().sum(dim=-1)
    return float(error - spread if name == "excess_over_spread" else error)


def over_truths(name: str, policy: Tensor, truth: Tensor, features: Tensor) -> float:
    """The expected score where the truth is drawn, too."""
    values = [exact(name, policy, features, y) for y in features]
    return float(truth @ torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_unbiased(name: str, n: int) -> None:
    """Over all n-tuples of a distribution with features of different lengths, one of them twice."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    features = unit(4, 5, dtype=torch.float64) * torch.tensor([[1.0], [0.5], [1.0], [2.0]])
    features[2] = features[0]
    y = unit(5, seed=1, dtype=torch.float64)
    tuples = torch.tensor(list(itertools.product(range(4), repeat=n)))
    found = SCORES[name](features[tuples], y.expand(len(tuples), 5))
    mean = float(p[tuples].prod(dim=1) @ found)
    assert mean == pytest.approx(exact(name, p, features, y), rel=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_energy_score_of_two_points_is_brier_s(p: float) -> None:
    """Of 1 with probability p and 0 else, where the truth is 1: (1 - p) ** 2."""
    total = 0.0
    for group in itertools.product((0.0, 1.0), repeat=3):
        weight = math.prod(p if x else 1 - p for x in group)
        total += weight * float(energy_score(torch.tensor(group)[:, None], torch.ones(1)))
    assert total == pytest.approx((1 - p) ** 2, abs=1e-6)


@pytest.mark.parametrize("z", [-1.5, 0.0, 0.4])
def test_energy_score_of_a_normal_distribution(z: float) -> None:
    """Its closed form is the CRPS (Gneiting & Raftery 2007, section 4.2); standard deviation 2."""
    normal = NormalDist()
    n = 3000
    x = 2 * torch.tensor([[normal.inv_cdf((i + 0.5) / n)] for i in range(n)], dtype=torch.float64)
    closed = 2 * (z * (2 * normal.cdf(z) - 1) + 2 * normal.pdf(z) - 1 / math.sqrt(math.pi))
    found = energy_score(x, torch.tensor([2 * z], dtype=torch.float64))
    assert float(found) == pytest.approx(closed, abs=1e-3)


def test_groups_are_scored_alone_in_float32() -> None:
    x, y = unit(3, 4, 5, 20), unit(3, 5, 20, seed=1)
    rewards = feature_matching_rewards(x, y, use_whitening=True)
    for row, block in itertools.product(range(3), range(5)):
        expected = plain_group(x[row, :, block], y[row, block])
        for name in SCORES:
            actual = getattr(rewards, name)[row, block]
            assert actual.dtype == torch.float32
            assert float(actual) == pytest.approx(expected[name], abs=2e-6), name


def test_excess_of_unit_features_is_minus_the_unwhitened_reward() -> None:
    rewards = feature_matching_rewards(
        unit(2, 4, 3, 16), unit(2, 3, 16, seed=1), use_whitening=False
    )
    torch.testing.assert_close(rewards.excess_over_spread, -rewards.reward.mean(dim=1))


def test_one_rollout_has_no_pairs() -> None:
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([0.0, 4.0])
    assert energy_score(x, y) == 5
    assert excess_over_spread(x, y) == cfm_loss(x, y) == 25


@pytest.mark.parametrize("name", SCORES)
def test_equal_rollouts_at_the_truth_score_zero(name: str) -> None:
    y = unit(4, 64)
    assert not SCORES[name](y[:, None].expand(4, 3, 64), y).any()


def test_energy_score_is_never_negative() -> None:
    """The CFM loss of two rollouts on opposite sides of the truth is; see test_rewards."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert energy_score(x, torch.zeros(2)) == 0
    assert (energy_score(unit(500, 2, 3), unit(500, 3, seed=1)) >= -1e-6).all()


@pytest.mark.parametrize("name", SCORES)
def test_autocast_changes_nothing(name: str) -> None:
    x, y = unit(3, 4, 64), unit(3, 64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SCORES[name](x, y), plain := SCORES[name](x, y))
    assert torch.equal(SCORES[name](x, y), plain)


# ---- Gaming -------------------------------------------------------------------------------------

#: Outcomes -1, 0 and 1 as the truth has them, and a mistake in another direction.
OUTCOMES = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
TRUTH = torch.tensor([0.25, 0.5, 0.25, 0.0], dtype=torch.float64)
TEMPERATURES = (1.0, 0.8, 0.6, 0.4)


def tempered(p: Tensor, temperature: float) -> Tensor:
    return (p.log() / temperature).softmax(dim=0)


def curve(name: str, policy: Tensor) -> list[float]:
    policies = [tempered(policy, temperature) for temperature in TEMPERATURES]
    return [over_truths(name, policy, TRUTH, OUTCOMES) for policy in policies]


def test_sharpening_a_right_policy_leaves_the_cfm_loss_and_raises_the_other_two() -> None:
    """Its mean stays where it was, which is all that the CFM loss sees."""
    least = float(TRUTH @ OUTCOMES.square().sum(dim=-1))  # the truth's own spread
    assert curve("cfm_loss", TRUTH) == pytest.approx([least] * len(TEMPERATURES))
    for name in ("energy_score", "excess_over_spread"):
        values = curve(name, TRUTH)
        assert all(b > a for a, b in itertools.pairwise(values)), name
        assert values[-1] > values[0] + 0.02, name
    assert curve("excess_over_spread", TRUTH)[0] == pytest.approx(0, abs=1e-12)


def test_sharpening_lowers_the_cfm_loss_of_a_policy_with_rare_mistakes_and_nothing_else() -> None:
    """One in 200 rollouts is wrong; sharpening removes it, and much that is right."""
    policy = 0.995 * TRUTH + torch.tensor([0.0, 0.0, 0.0, 0.005])
    values = curve("cfm_loss", policy)
    assert all(b < a for a, b in itertools.pairwise(values))
    values = curve("energy_score", policy)
    assert all(b > a for a, b in itertools.pairwise(values))
    cross_entropy = [-float(TRUTH[:3] @ tempered(policy, t).log()[:3]) for t in TEMPERATURES]
    assert all(b > a for a, b in itertools.pairwise(cross_entropy))


def test_spreading_lowers_the_excess_and_raises_the_energy_score() -> None:
    """Why the excess is no score to be minimised."""
    wider = tempered(TRUTH, 1.5)
    for name, sign in {"excess_over_spread": -1, "energy_score": 1}.items():
        before, after = (over_truths(name, p, TRUTH, OUTCOMES) for p in (TRUTH, wider))
        assert sign * (after - before) > 0.001, name


@pytest.mark.parametrize("seed", range(20))
def test_only_the_truth_s_own_distribution_reaches_the_least_energy_score(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = unit(5, 3, seed=seed, dtype=torch.float64)
    truth, other = (torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2))
    truth, other = truth / truth.sum(), other / other.sum()
    least = over_truths("energy_score", truth, truth, features)
    assert over_truths("energy_score", other, truth, features) > least
    # A hair's breadth away it is higher, too.
    near = 0.99 * truth + 0.01 * other
    assert over_truths("energy_score", near, truth, features) > least
