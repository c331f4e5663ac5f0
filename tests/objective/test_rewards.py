"""Rewards against plain loops; the CFM estimate and its gradient by exact enumeration."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_ebft.config import GROUP_WHITENING_SPACES
from hf_ebft.objective.rewards import feature_matching_rewards
from tests.support.plain_objective import unit, whiten_by_svd


def rewards_by_loops(
    generated: Tensor,
    ground_truth: Tensor,
    alignment_coef: float,
    diversity_coef: float,
    whitening_space: str | None,
) -> dict[str, Tensor]:
    """The formulas of the docstring, one rollout after the other, in float64."""
    n_documents, n, n_blocks, _ = generated.shape
    alignment = torch.zeros(n_documents, n, n_blocks, dtype=torch.float64)
    diversity, cfm_loss = alignment.clone(), alignment[:, 0].clone()
    for b, k in itertools.product(range(n_documents), range(n_blocks)):
        y = ground_truth[b, k].double()
        x = [generated[b, j, k].double() for j in range(n)]
        pairs = [x[j] @ x[i] for j in range(n) for i in range(n) if i != j]
        if n > 1:
            to_truth = sum(x_j @ y for x_j in x) / n
            cfm_loss[b, k] = sum(pairs) / len(pairs) - 2 * to_truth + y @ y
        else:
            cfm_loss[b, k] = (x[0] - y) @ (x[0] - y)
        ys = [y] * n
        if whitening_space is not None:
            white = whiten_by_svd(torch.stack(x), y, whitening_space)
            x, ys = list(white.generated), list(white.ground_truth.expand(n, -1))
        for j in range(n):
            cosine = x[j] @ ys[j] / (x[j].norm() * ys[j].norm())
            alignment[b, j, k] = 2 * cosine
            if n > 1:
                others = sum(x[j] @ x[i] for i in range(n) if i != j)
                diversity[b, j, k] = 2 / (n - 1) * others
    reward = alignment_coef * alignment - diversity_coef * diversity
    return {"reward": reward, "alignment": alignment, "diversity": diversity, "cfm_loss": cfm_loss}


@pytest.mark.parametrize("whitening_space", [None, *GROUP_WHITENING_SPACES])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("duplicates", [False, True])
def test_equals_plain_loops(whitening_space: str | None, n: int, duplicates: bool) -> None:
    generated, ground_truth = unit(3, n, 4, 20), unit(3, 4, 20, seed=1)
    if duplicates:
        generated[:, n // 2] = generated[:, 0]
    rewards = feature_matching_rewards(
        generated,
        ground_truth,
        alignment_coef=0.7,
        diversity_coef=0.3,
        use_whitening=whitening_space is not None,
        whitening_space=whitening_space or "feature",
    )
    expected = rewards_by_loops(generated, ground_truth, 0.7, 0.3, whitening_space)
    for name, value in expected.items():
        actual = getattr(rewards, name)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), value, rtol=1e-5, atol=1e-6)
    assert (rewards.alignment_coef, rewards.diversity_coef) == (0.7, 0.3)


def test_defaults_are_the_papers() -> None:
    generated, ground_truth = unit(2, 4, 3, 16), unit(2, 3, 16, seed=1)
    defaults = feature_matching_rewards(generated, ground_truth)
    stated = feature_matching_rewards(
        generated,
        ground_truth,
        alignment_coef=1.0,
        diversity_coef=1.0,
        use_whitening=True,
        whitening_space="feature",
        whitening_tolerance=1e-5,
    )
    assert torch.equal(defaults.reward, stated.reward)
    assert (defaults.alignment_coef, defaults.diversity_coef) == (1.0, 1.0)


def test_the_tolerance_is_passed_to_the_whitening() -> None:
    generated = unit(1, 1, 1, 16).repeat(1, 2, 1, 1)
    generated[0, 1] += 1e-3 * unit(1, 16, seed=1)
    ground_truth = unit(1, 1, 16, seed=2)
    kept = feature_matching_rewards(generated, ground_truth)
    dropped = feature_matching_rewards(generated, ground_truth, whitening_tolerance=1e-2)
    assert kept.diversity.abs().max() < 1e-5
    torch.testing.assert_close(dropped.diversity, torch.ones(1, 2, 1))


@pytest.mark.parametrize("use_whitening", [False, True])
@pytest.mark.parametrize("whitening_space", GROUP_WHITENING_SPACES)
def test_degenerate_groups_are_finite(use_whitening: bool, whitening_space: str) -> None:
    generated, ground_truth = unit(1, 6, 5, 4), unit(1, 5, 4, seed=1)  # n > D
    generated[:, :, 1] = generated[:, :1, 1]  # all rollouts equal
    generated[:, :, 2] = 0
    ground_truth[:, 3] = 0
    generated[:, :, 4] = ground_truth[:, None, 4]  # all rollouts equal to the ground truth
    rewards = feature_matching_rewards(
        generated, ground_truth, use_whitening=use_whitening, whitening_space=whitening_space
    )
    for values in (rewards.reward, rewards.alignment, rewards.diversity, rewards.cfm_loss):
        assert values.isfinite().all()
    assert rewards.alignment.abs().max() <= 2 + 1e-6
    assert not rewards.alignment[:, :, 2:4].any()
    torch.testing.assert_close(rewards.alignment[:, :, 4], torch.full((1, 6), 2.0))
    assert not rewards.cfm_loss[:, 4].any()
    # Six copies: 2 * 1, or 2 * 1/6 once they share a whitened dimension.
    expected = torch.full((1, 6), 1 / 3 if use_whitening else 2.0)
    torch.testing.assert_close(rewards.diversity[:, :, 1], expected)


def test_no_blocks() -> None:
    rewards = feature_matching_rewards(torch.zeros(2, 4, 0, 8), torch.zeros(2, 0, 8))
    assert rewards.reward.shape == (2, 4, 0)
    assert rewards.cfm_loss.shape == (2, 0)


@pytest.mark.parametrize("use_whitening", [False, True])
def test_a_single_rollout_has_no_diversity(use_whitening: bool) -> None:
    rewards = feature_matching_rewards(
        unit(2, 1, 3, 8), unit(2, 3, 8, seed=1), use_whitening=use_whitening
    )
    assert not rewards.diversity.any()
    assert torch.equal(rewards.reward, rewards.alignment)


def test_cfm_loss_does_not_depend_on_whitening() -> None:
    generated, ground_truth = unit(2, 4, 3, 16), unit(2, 3, 16, seed=1)
    on = feature_matching_rewards(generated, ground_truth, use_whitening=True)
    off = feature_matching_rewards(generated, ground_truth, use_whitening=False)
    assert torch.equal(on.cfm_loss, off.cfm_loss)


@pytest.mark.parametrize("use_whitening", [False, True])
def test_autocast_does_not_change_rewards_of_half_precision_features(use_whitening: bool) -> None:
    generated, ground_truth = unit(2, 4, 3, 64).bfloat16(), unit(2, 3, 64, seed=1).bfloat16()
    expected = feature_matching_rewards(
        generated.float(), ground_truth.float(), use_whitening=use_whitening
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rewards = feature_matching_rewards(generated, ground_truth, use_whitening=use_whitening)
    for name in ("reward", "alignment", "diversity", "cfm_loss"):
        assert getattr(rewards, name).dtype == torch.float32
        assert torch.equal(getattr(rewards, name), getattr(expected, name))


@settings(deadline=None)  # machines may be busy
@given(
    n=st.integers(1, 6),
    width=st.integers(1, 12),
    space=st.sampled_from([None, *GROUP_WHITENING_SPACES]),
    seed=st.integers(0, 2**31),
)
def test_order_of_the_rollouts_does_not_matter(
    n: int, width: int, space: str | None, seed: int
) -> None:
    generated = unit(2, n, 3, width, seed=seed, dtype=torch.float64)
    ground_truth = unit(2, 3, width, seed=seed + 1, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    whitening = {"use_whitening": space is not None, "whitening_space": space or "feature"}
    rewards = feature_matching_rewards(generated, ground_truth, **whitening)
    moved = feature_matching_rewards(generated[:, order], ground_truth, **whitening)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(moved.diversity, rewards.diversity[:, order], **close)
    torch.testing.assert_close(moved.cfm_loss, rewards.cfm_loss, **close)
    if space != "sample":
        # In sample space the sign of (P 1)_j decides, and n > D makes it 0 but for rounding.
        torch.testing.assert_close(moved.alignment, rewards.alignment[:, order], **close)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_cfm_loss_is_unbiased(n: int) -> None:
    """Over all n-tuples of a distribution; with one rollout the variance comes on top."""
    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    outcomes = unit(4, 6, dtype=torch.float64)
    y = unit(6, seed=1, dtype=torch.float64)
    tuples = torch.tensor(list(itertools.product(range(4), repeat=n)))
    rewards = feature_matching_rewards(
        outcomes[tuples].unsqueeze(2), y.expand(len(tuples), 1, 6), use_whitening=False
    )
    mean = (probabilities[tuples].prod(dim=1) * rewards.cfm_loss.squeeze(1)).sum()
    mean_feature = probabilities @ outcomes
    expected = (mean_feature - y).square().sum()
    if n == 1:
        expected += probabilities @ (outcomes - mean_feature).square().sum(dim=1)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)


def test_cfm_loss_may_be_negative() -> None:
    """The price of being unbiased: two rollouts on opposite sides of the ground truth."""
    generated = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).reshape(1, 2, 1, 2)
    rewards = feature_matching_rewards(generated, torch.zeros(1, 1, 2), use_whitening=False)
    assert rewards.cfm_loss.item() == pytest.approx(-1)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_unwhitened_reward_is_the_gradient_of_the_cfm_loss(n: int) -> None:
    """E[mean_j reward_j * grad log p_j] = -grad CFM, for a softmax policy over five outcomes."""
    logits = torch.tensor([0.3, -1.0, 0.5, 0.0, 1.2], dtype=torch.float64)
    outcomes = unit(5, 6, dtype=torch.float64)
    y = unit(6, seed=1, dtype=torch.float64)

    def cfm_loss(logits: Tensor) -> float:
        return (logits.softmax(0) @ outcomes - y).square().sum().item()

    step = 1e-5
    gradient = torch.tensor(
        [
            (cfm_loss(logits + step * e) - cfm_loss(logits - step * e)) / (2 * step)
            for e in torch.eye(5, dtype=torch.float64)
        ],
        dtype=torch.float64,
    )

    probabilities = logits.softmax(0)
    tuples = torch.tensor(list(itertools.product(range(5), repeat=n)))
    rewards = feature_matching_rewards(
        outcomes[tuples].unsqueeze(2), y.expand(len(tuples), 1, 6), use_whitening=False
    )
    grad_log_p = F.one_hot(tuples, 5) - probabilities  # (tuples, n, 5)
    estimates = (rewards.reward * grad_log_p).mean(dim=1)
    mean = probabilities[tuples].prod(dim=1) @ estimates
    torch.testing.assert_close(mean, -gradient, rtol=0, atol=1e-9)
    assert gradient.norm() > 0.1


@pytest.mark.parametrize(
    ("generated", "ground_truth", "message"),
    [
        ((4, 2, 8), (2, 8), r"\(B, n, K, D\).*\(4, 2, 8\).*single block"),
        ((1, 4, 2, 8), (1, 4, 2, 8), r"ground_truth \(B, K, D\)"),
        ((1, 4, 2, 8), (2, 2, 8), "agree in B, K and D"),
        ((1, 4, 2, 8), (1, 3, 8), "agree in B, K and D"),
        ((1, 4, 2, 8), (1, 2, 9), "agree in B, K and D"),
        ((2, 4, 2, 8), (2, 4, 8), "don't repeat it"),
        ((1, 0, 2, 8), (1, 2, 8), "at least one rollout"),
        ((1, 4, 2, 0), (1, 2, 0), "one feature dimension"),
    ],
)
def test_shapes_that_do_not_fit(
    generated: tuple[int, ...], ground_truth: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        feature_matching_rewards(torch.zeros(generated), torch.zeros(ground_truth))


def test_tokens_are_not_features() -> None:
    tokens = torch.zeros(1, 4, 2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"floating point.*int64.*not the token ids"):
        feature_matching_rewards(tokens, torch.zeros(1, 2, 8))


@pytest.mark.parametrize("use_whitening", [False, True])
def test_unknown_whitening_space(use_whitening: bool) -> None:
    """Also with whitening off: a typing error is reported at once."""
    with pytest.raises(ValueError, match=r"'features' is unknown.*'feature', 'sample'"):
        feature_matching_rewards(
            unit(1, 4, 2, 8),
            unit(1, 2, 8),
            use_whitening=use_whitening,
            whitening_space="features",
        )


def test_alignment_is_a_cosine() -> None:
    generated = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]).reshape(1, 3, 1, 2)
    ground_truth = torch.tensor([[[1.0, 1.0]]])
    rewards = feature_matching_rewards(generated, ground_truth, use_whitening=False)
    root = math.sqrt(2)
    torch.testing.assert_close(rewards.alignment.flatten(), torch.tensor([root, -root, root]))
