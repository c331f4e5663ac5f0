"""Rollouts are equal if their tokens are; features that differ by rounding must not hide it."""

import pytest
import torch
from torch import Tensor

from hf_ebft.objective import feature_matching_rewards
from hf_ebft.objective.duplicates import first_equal_rollouts, with_equal_features

# As far apart as features of equal rollouts were found in bfloat16.
ROUNDING = 5e-4


def rollouts(kinds: list[list[int]], width: int = 3) -> Tensor:
    """(B, n, 1, G) tokens: of each row, rollouts with the same number are the same."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randint(50, (10, width), generator=generator)
    return torch.stack([distinct[torch.tensor(row)] for row in kinds])[:, :, None]


def noisy_features(kinds: list[list[int]]) -> Tensor:
    """(B, n, 1, D) unit features, those of equal rollouts `ROUNDING` apart."""
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize
    distinct = unit(torch.randn(10, 16, generator=generator), dim=-1)
    features = torch.stack([distinct[torch.tensor(row)] for row in kinds])
    noise = unit(torch.randn(features.shape, generator=generator), dim=-1)
    return unit(features + ROUNDING * noise, dim=-1)[:, :, None]


def test_first_equal_rollouts_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, (3, 6, 5, 2), generator=generator)
    found = first_equal_rollouts(tokens)
    for b, j, k in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        equal = [i for i in range(6) if tokens[b, i, k].tolist() == tokens[b, j, k].tolist()]
        assert int(found[b, j, k]) == equal[0]


@pytest.mark.parametrize("space", ["feature", "sample"])
def test_diversity_of_duplicates_has_its_closed_form(space: str) -> None:
    """m equal rollouts of n have whitened dot products of 1/m: diversity 2 (m - 1) / (m (n - 1)).

    Without the decision by tokens every one of these is 0.
    """
    kinds = [[0, 1, 0, 2], [3, 3, 3, 4], [5, 5, 6, 6], [7, 7, 7, 7], [0, 1, 2, 3]]
    expected = torch.tensor(
        [
            [1 / 3, 0, 1 / 3, 0],
            [4 / 9, 4 / 9, 4 / 9, 0],
            [1 / 3] * 4,
            [1 / 2] * 4,
            [0.0] * 4,
        ]
    )
    features = noisy_features(kinds)
    first = first_equal_rollouts(rollouts(kinds))
    truth = torch.ones(len(kinds), 1, 16)
    found = feature_matching_rewards(
        with_equal_features(features, first), truth, whitening_space=space
    )
    torch.testing.assert_close(found.diversity[..., 0], expected, rtol=0, atol=1e-6)
    undecided = feature_matching_rewards(features, truth, whitening_space=space)
    assert float(undecided.diversity.abs().max()) < 1e-3  # the noise is large enough to matter


def test_equal_rollouts_get_the_same_features_and_others_are_unchanged() -> None:
    kinds = [[0, 1, 0, 2]]
    features = noisy_features(kinds)
    found = with_equal_features(features, first_equal_rollouts(rollouts(kinds)))
    assert torch.equal(found[:, 2], features[:, 0]) and not torch.equal(found[:, 2], features[:, 2])
    assert torch.equal(found[:, [0, 1, 3]], features[:, [0, 1, 3]])
