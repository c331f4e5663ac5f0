"""Advantages against plain loops; that baselines are independent and estimators unbiased."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_ebft.config import ADVANTAGE_ESTIMATORS
from hf_ebft.objective.advantages import compute_advantages, rloo_baseline
from hf_ebft.objective.rewards import Rewards, feature_matching_rewards
from tests.support import plain_objective

unit = functools.partial(plain_objective.unit, dtype=torch.float64)


def make_rewards(n: int, *, seed: int = 0, use_whitening: bool = False) -> Rewards:
    return feature_matching_rewards(
        unit(2, n, 3, 12, seed=seed),
        unit(2, 3, 12, seed=seed + 1),
        alignment_coef=0.9,
        diversity_coef=0.4,
        use_whitening=use_whitening,
    )


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_rloo_baseline_is_the_reward_of_the_others_alone(n: int) -> None:
    """b_j from a world in which rollout j was never sampled, computed from the features."""
    generated, ground_truth = unit(2, n, 3, 12), unit(2, 3, 12, seed=1)
    coefficients = {"alignment_coef": 0.9, "diversity_coef": 0.4}
    rewards = feature_matching_rewards(generated, ground_truth, use_whitening=False, **coefficients)
    baseline = rloo_baseline(rewards)
    for j in range(n):
        others = [i for i in range(n) if i != j]
        without_j = feature_matching_rewards(
            generated[:, others], ground_truth, use_whitening=False, **coefficients
        )
        # One rollout alone has no diversity: the 0 of n = 2 comes out by itself.
        expected = without_j.reward.mean(dim=1)
        torch.testing.assert_close(baseline[:, j], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_rloo_equals_plain_loops(n: int) -> None:
    rewards = make_rewards(n, use_whitening=True)
    # Diversity that whitening has not made 0: any figures will do here.
    rewards = replace(rewards, diversity=torch.randn(2, n, 3, dtype=torch.float64))
    advantages = compute_advantages(rewards, "rloo")
    for b, j, k in itertools.product(range(2), range(n), range(3)):
        a, d = rewards.alignment[b, :, k].tolist(), rewards.diversity[b, :, k].tolist()
        baseline = 0.9 * (sum(a) - a[j]) / (n - 1)
        if n > 2:
            baseline -= 0.4 * (sum(d) - 2 * d[j]) / (n - 2)
        assert advantages[b, j, k].item() == pytest.approx(
            rewards.reward[b, j, k].item() - baseline
        )


@pytest.mark.parametrize("n", [2, 3, 5])
def test_group_norm_equals_plain_loops(n: int) -> None:
    rewards = make_rewards(n)
    advantages = compute_advantages(rewards, "group_norm")
    for b, k in itertools.product(range(2), range(3)):
        group = rewards.reward[b, :, k].tolist()
        mean = sum(group) / n
        deviation = (sum((r - mean) ** 2 for r in group) / (n - 1)) ** 0.5
        expected = [(r - mean) / (deviation + 1e-4) for r in group]
        assert advantages[b, :, k].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 4])
def test_reinforce_is_the_reward(n: int) -> None:
    rewards = make_rewards(n)
    assert torch.equal(compute_advantages(rewards, "reinforce"), rewards.reward)


def test_rloo_is_the_default() -> None:
    rewards = make_rewards(4)
    assert torch.equal(compute_advantages(rewards), compute_advantages(rewards, "rloo"))


@settings(deadline=None)  # machines may be busy
@given(n=st.integers(3, 9), seed=st.integers(0, 2**31), use_whitening=st.booleans())
def test_rloo_advantages_sum_to_zero(n: int, seed: int, use_whitening: bool) -> None:
    """So a trainer that subtracts group means does not change them."""
    advantages = compute_advantages(make_rewards(n, seed=seed, use_whitening=use_whitening))
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(2, 3).double())


def test_rloo_with_two_rollouts_keeps_the_diversity() -> None:
    """There is no pair without j: the alignment part alone sums to zero."""
    rewards = make_rewards(2)
    expected = -0.4 * rewards.diversity.sum(dim=1)
    torch.testing.assert_close(compute_advantages(rewards).sum(dim=1), expected)


@settings(deadline=None)  # machines may be busy
@given(n=st.integers(3, 6), j=st.integers(0, 5), seed=st.integers(0, 2**31), size=st.floats(0, 100))
def test_baseline_does_not_depend_on_its_own_rollout(
    n: int, j: int, seed: int, size: float
) -> None:
    j %= n
    generated, ground_truth = unit(1, n, 2, 8, seed=seed), unit(1, 2, 8, seed=seed + 1)
    replaced = generated.clone()
    replaced[:, j] = size * unit(1, 2, 8, seed=seed + 2)
    for coefficients in ((1.0, 0.0), (0.0, 1.0)):  # the alignment part, the diversity part
        before, after = (
            rloo_baseline(
                feature_matching_rewards(
                    features,
                    ground_truth,
                    alignment_coef=coefficients[0],
                    diversity_coef=coefficients[1],
                    use_whitening=False,
                )
            )
            for features in (generated, replaced)
        )
        torch.testing.assert_close(after[:, j], before[:, j], rtol=0, atol=1e-9)


class SoftmaxPolicy:
    """A softmax policy over five outcomes with unit features, small enough to enumerate.

    The features share a direction, as those of language models do: their cosines are about 0.8.
    Every n-tuple of rollouts is one document of a batch, so that expectations are exact sums.
    """

    def __init__(
        self, n: int, seed: int, *, alignment_coef: float = 1.0, diversity_coef: float = 1.0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(5, generator=generator, dtype=torch.float64)
        features = F.normalize(2 * unit(6, seed=seed) + unit(6, 6, seed=seed + 1), dim=-1)
        self.outcomes, self.y = features[:5], features[5]
        self.tuples = torch.tensor(list(itertools.product(range(5), repeat=n)))
        self.probability = self.logits.softmax(0)[self.tuples].prod(dim=1)
        self.rewards = feature_matching_rewards(
            self.outcomes[self.tuples].unsqueeze(2),
            self.y.expand(len(self.tuples), 1, 6),
            alignment_coef=alignment_coef,
            diversity_coef=diversity_coef,
            use_whitening=False,
        )

    def mean_and_variance(self, advantages: Tensor) -> tuple[Tensor, float]:
        """Of the estimate mean_j advantage_j * grad log p_j; the variance is summed over logits."""
        grad_log_p = F.one_hot(self.tuples, 5) - self.logits.softmax(0)
        estimates = (advantages * grad_log_p).mean(dim=1)
        mean = self.probability @ estimates
        return mean, (self.probability @ (estimates - mean).square().sum(dim=1)).item()

    def variance_ratio(self) -> float:
        """Variance of the policy gradient by rloo over that by reinforce."""
        _, of_rloo = self.mean_and_variance(compute_advantages(self.rewards, "rloo"))
        _, of_reinforce = self.mean_and_variance(compute_advantages(self.rewards, "reinforce"))
        return of_rloo / of_reinforce

    def cfm_gradient(self) -> Tensor:
        """Central differences of ||E[x] - y||^2 in the logits."""

        def cfm_loss(logits: Tensor) -> Tensor:
            return (logits.softmax(0) @ self.outcomes - self.y).square().sum()

        steps = 1e-5 * torch.eye(5, dtype=torch.float64)
        differences = [cfm_loss(self.logits + e) - cfm_loss(self.logits - e) for e in steps]
        return torch.stack(differences) / 2e-5


@pytest.mark.parametrize("estimator", ["reinforce", "rloo"])
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_expected_policy_gradient_is_the_gradient_of_the_cfm_loss(
    estimator: str, n: int, seed: int
) -> None:
    policy = SoftmaxPolicy(n, seed)
    mean, _ = policy.mean_and_variance(compute_advantages(policy.rewards, estimator))
    gradient = policy.cfm_gradient()
    torch.testing.assert_close(mean, -gradient, rtol=0, atol=1e-9)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_rloo_has_less_variance_where_rewards_share_an_offset(n: int, seed: int) -> None:
    assert SoftmaxPolicy(n, seed, diversity_coef=0.0).variance_ratio() < 0.2
    if n > 2:  # with two rollouts the diversity part has no baseline
        assert SoftmaxPolicy(n, seed, alignment_coef=0.0).variance_ratio() < 0.2


def test_rloo_has_less_variance_with_whitening() -> None:
    """By sampling: among five outcomes almost every group would hold duplicates."""
    n_outcomes, n_groups, width = 200, 4000, 64
    features = F.normalize(2 * unit(width) + unit(n_outcomes + 1, width, seed=1), dim=-1)
    probability = torch.randn(n_outcomes, dtype=torch.float64).softmax(0)
    rollouts = torch.multinomial(probability.expand(n_groups, -1), 4, replacement=True)
    rewards = feature_matching_rewards(
        features[rollouts].unsqueeze(2), features[-1].expand(n_groups, 1, width)
    )
    grad_log_p = F.one_hot(rollouts, n_outcomes) - probability
    variances = {
        estimator: (compute_advantages(rewards, estimator) * grad_log_p).mean(1).var(0).sum()
        for estimator in ("rloo", "reinforce")
    }
    assert variances["rloo"] < 0.5 * variances["reinforce"]


@pytest.mark.parametrize("seed", range(5))
def test_rloo_with_two_rollouts_has_far_more_variance_for_balanced_rewards(seed: int) -> None:
    """The warning in the docstring: unwhitened, equal coefficients, n = 2."""
    assert SoftmaxPolicy(2, seed).variance_ratio() > 5


def test_plain_leave_one_out_mean_would_be_biased() -> None:
    """Guards the factor 2 in the baseline: each diversity contains the rollout itself."""
    policy = SoftmaxPolicy(4, seed=0)
    reward = policy.rewards.reward
    plain = reward - (reward.sum(dim=1, keepdim=True) - reward) / 3
    mean, _ = policy.mean_and_variance(plain)
    assert (mean + policy.cfm_gradient()).norm() > 0.1 * policy.cfm_gradient().norm()


@pytest.mark.parametrize("estimator", ["rloo", "group_norm"])
@pytest.mark.parametrize("use_whitening", [False, True])
def test_advantages_of_duplicates_are_zero_but_for_rounding(
    estimator: str, use_whitening: bool
) -> None:
    """In float32, where their rewards are not equal to the last bit."""
    generated = unit(1, 1, 5, 64).float().repeat(1, 4, 1, 1) + 1e-8 * torch.randn(1, 4, 5, 64)
    rewards = feature_matching_rewards(
        generated, unit(1, 5, 64, seed=1).float(), use_whitening=use_whitening
    )
    assert compute_advantages(rewards, estimator).abs().max() < 1e-2


@pytest.mark.parametrize("estimator", ["rloo", "group_norm"])
def test_estimators_with_a_baseline_need_two_rollouts(estimator: str) -> None:
    with pytest.raises(ValueError, match=f"'{estimator}'.*n_samples_per_prompt.*'reinforce'"):
        compute_advantages(make_rewards(1), estimator)


def test_a_single_rollout_has_no_baseline() -> None:
    with pytest.raises(ValueError, match="n_samples_per_prompt"):
        rloo_baseline(make_rewards(1))


def test_fitted_advantages_cannot_be_computed_from_rewards() -> None:
    with pytest.raises(ValueError, match=r"'fitted' needs more than rewards"):
        compute_advantages(make_rewards(4), "fitted")


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match=r"'gae' is unknown.*'rloo', 'group_norm', 'reinforce'"):
        compute_advantages(make_rewards(4), "gae")


@pytest.mark.parametrize("estimator", [e for e in ADVANTAGE_ESTIMATORS if e != "fitted"])
def test_no_blocks(estimator: str) -> None:
    rewards = feature_matching_rewards(torch.zeros(2, 4, 0, 8), torch.zeros(2, 0, 8))
    assert compute_advantages(rewards, estimator).shape == (2, 4, 0)
