"""Whitening against an explicit float64 SVD of each group, and by what it must leave behind."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_ebft.config import GROUP_WHITENING_SPACES
from hf_ebft.objective import whitening
from hf_ebft.objective.whitening import whiten
from tests.support.plain_objective import unit, whiten_by_svd


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """The error is measured against the whole vector or matrix: entries near zero may be noise."""
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm(), f"relative error {error}"


def near_duplicate(distance: float) -> Tensor:
    """Four rollouts, the last one at a distance from the first."""
    x = unit(3, 512)
    return torch.cat((x, x[:1] + distance * unit(1, 512, seed=1)))


GROUPS = {
    "different": unit(4, 64),
    "wide": unit(16, 2000),
    "more rollouts than dimensions": unit(6, 4),
    "square": unit(5, 5),
    "single rollout": unit(1, 8),
    "duplicates": unit(3, 64)[[0, 1, 1, 2, 1]],
    "all equal": unit(1, 64).expand(4, 64),
    "duplicates but for rounding": near_duplicate(1e-7),
    "nearly duplicates, dropped": near_duplicate(1e-6),
    "nearly duplicates, kept": near_duplicate(1e-3),
}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
@pytest.mark.parametrize("group", GROUPS)
def test_equals_the_svd(group: str, space: str, scale: float) -> None:
    generated = GROUPS[group] * scale
    ground_truth = unit(generated.shape[-1], seed=2) * scale
    whitened = whiten(generated, ground_truth, space=space)
    expected = whiten_by_svd(generated, ground_truth, space)
    assert_close(whitened.generated, expected.generated, 2e-7)
    assert_close(whitened.ground_truth, expected.ground_truth, 2e-7)


@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
@pytest.mark.parametrize("distance", [3e-5, 1e-4])
def test_singular_values_just_above_the_tolerance_keep_five_digits(
    space: str, distance: float
) -> None:
    """The Gram matrix has the squares of the singular values, 1e-9 here: float32 has none of it."""
    generated, ground_truth = near_duplicate(distance), unit(512, seed=2)
    whitened = whiten(generated, ground_truth, space=space)
    expected = whiten_by_svd(generated, ground_truth, space)
    assert_close(whitened.generated, expected.generated, 1e-5)
    assert_close(whitened.ground_truth, expected.ground_truth, 1e-5)


@settings(deadline=None)  # machines may be busy
@given(
    space=st.sampled_from(GROUP_WHITENING_SPACES),
    n_rollouts=st.integers(1, 8),
    width=st.integers(1, 24),
    data=st.data(),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_equals_the_svd_for_any_group(
    space: str, n_rollouts: int, width: int, data: st.DataObject, scale: float, seed: int
) -> None:
    places = st.lists(st.integers(0, n_rollouts - 1), min_size=n_rollouts, max_size=n_rollouts)
    # float64 in and out, so that an ill-conditioned draw shows its own error and not float32's.
    generator = torch.Generator().manual_seed(seed)
    different = torch.randn(n_rollouts, width, generator=generator, dtype=torch.float64)
    generated = scale * different[data.draw(places)]
    ground_truth = scale * torch.randn(width, generator=generator, dtype=torch.float64)
    whitened = whiten(generated, ground_truth, space=space)
    assert whitened.generated.dtype == torch.float64
    expected = whiten_by_svd(generated, ground_truth, space)
    assert_close(whitened.generated, expected.generated)
    assert_close(whitened.ground_truth, expected.ground_truth)


@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (2, 0)])
@pytest.mark.parametrize("slice_values", [1, 150, 2**21])
def test_groups_are_independent_whatever_the_slices(
    space: str, leading: tuple[int, ...], slice_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whitening, "_SLICE_VALUES", slice_values)
    # Rollouts and blocks transposed, as the rewards pass them: not contiguous.
    generated = torch.randn(4, *leading, 20).movedim(0, -2)
    ground_truth = torch.randn(*leading, 20)
    whitened = whiten(generated, ground_truth, space=space)
    assert whitened.generated.shape == generated.shape
    y_shape = ground_truth.shape if space == "feature" else generated.shape
    assert whitened.ground_truth.shape == y_shape
    for index in itertools.product(*map(range, leading)):
        expected = whiten_by_svd(generated[index], ground_truth[index], space)
        assert_close(whitened.generated[index], expected.generated)
        assert_close(whitened.ground_truth[index], expected.ground_truth)


def test_groups_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a decomposition for each block (0.7 s each at D = 6144)."""
    batches = []
    eigh = torch.linalg.eigh

    def counting_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
        batches.append(matrix.shape)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counting_eigh)
    whiten(torch.randn(4, 127, 4, 96), torch.randn(4, 127, 96))
    assert batches == [(508, 4, 4)]


@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
def test_no_matrix_of_feature_dimensions(space: str) -> None:
    """At this width a D x D matrix would take 160 GB."""
    generated = unit(2, 2, 200_000)
    whitened = whiten(generated, unit(2, 200_000, seed=1), space=space)
    products = whitened.generated @ whitened.generated.mT
    torch.testing.assert_close(products, torch.eye(2).expand(2, 2, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
def test_different_rollouts_become_orthonormal(space: str) -> None:
    # Anything but orthogonal before: rollouts that share most of their feature.
    generated = F.normalize(unit(10, 1, 64) + 0.3 * unit(10, 6, 64, seed=1), dim=-1)
    assert (generated @ generated.mT).min() > 0.8
    whitened, _ = whiten(generated, unit(10, 64, seed=2), space=space)
    identity = torch.eye(6).expand(10, 6, 6)
    torch.testing.assert_close(whitened @ whitened.mT, identity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_duplicates_share_a_dimension(space: str, rounding: float) -> None:
    """1/m among m duplicates, also where the batch they were computed in rounded them apart."""
    copies = [0, 1, 0, 2, 0, 1]
    generated = unit(3, 48)[copies] + rounding * torch.randn(6, 48)
    whitened, _ = whiten(generated, unit(48, seed=1), space=space)
    counts = {rollout: copies.count(rollout) for rollout in copies}
    expected = torch.tensor([[1 / counts[a] if a == b else 0.0 for b in copies] for a in copies])
    torch.testing.assert_close(whitened @ whitened.mT, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
def test_zero_features_stay_zero(space: str) -> None:
    generated = torch.stack((torch.zeros(4, 16), unit(4, 16)))
    whitened = whiten(generated, unit(2, 16, seed=1), space=space)
    assert not whitened.generated[0].any()
    assert not whitened.ground_truth[0].any()
    assert_close(whitened.generated[1], whiten_by_svd(generated[1], unit(16), space).generated)


@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_features_spoil_their_own_group_only(space: str, bad: float) -> None:
    generated, ground_truth = unit(3, 4, 16), unit(3, 16, seed=1)
    expected = whiten(generated, ground_truth, space=space)
    generated[1, 2, 5] = bad
    whitened = whiten(generated, ground_truth, space=space)
    assert whitened.generated[1].isnan().all()
    assert whitened.ground_truth[1].isnan().all()
    for group in (0, 2):
        assert_close(whitened.generated[group], expected.generated[group])
        assert_close(whitened.ground_truth[group], expected.ground_truth[group])


@settings(deadline=None)  # machines may be busy
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_symmetries(seed: int, scale: float) -> None:
    """Order and scale of the rollouts do not matter, nor does a rotation of the features."""
    generator = torch.Generator().manual_seed(seed)
    generated = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    ground_truth = torch.randn(12, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    order = torch.randperm(5, generator=generator)
    expected = whiten(generated, ground_truth)
    moved = whiten(scale * generated[order] @ rotation, scale * ground_truth @ rotation)
    assert_close(moved.generated, expected.generated[order] @ rotation)
    assert_close(moved.ground_truth, expected.ground_truth @ rotation)


@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
def test_whitening_twice_changes_nothing(space: str) -> None:
    once = whiten(unit(5, 40), unit(40, seed=1), space=space)
    twice = whiten(once.generated, unit(40, seed=1), space=space)
    assert_close(twice.generated, once.generated)


def test_both_spaces_whiten_rollouts_alike() -> None:
    generated, ground_truth = unit(3, 5, 40)[:, [0, 1, 2, 2, 3]], unit(3, 40, seed=1)
    feature = whiten(generated, ground_truth, space="feature")
    sample = whiten(generated, ground_truth, space="sample")
    assert_close(feature.generated, sample.generated)


def test_a_higher_tolerance_drops_more() -> None:
    generated, ground_truth = near_duplicate(1e-3), unit(512, seed=2)
    whitened = whiten(generated, ground_truth, tolerance=1e-2)
    expected = whiten_by_svd(generated, ground_truth, "feature", tolerance=1e-2)
    assert_close(whitened.generated, expected.generated)
    assert_close(whitened.ground_truth, expected.ground_truth)
    assert whitened.generated[0] @ whitened.generated[3] > 0.4  # duplicates again


@pytest.mark.parametrize("space", GROUP_WHITENING_SPACES)
def test_half_precision_and_autocast_lose_nothing_more(space: str) -> None:
    generated, ground_truth = unit(3, 4, 64).bfloat16(), unit(3, 64, seed=1).bfloat16()
    expected = whiten(generated.float(), ground_truth.float(), space=space)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whitened = whiten(generated, ground_truth, space=space)
    assert whitened.generated.dtype == whitened.ground_truth.dtype == torch.float32
    assert torch.equal(whitened.generated, expected.generated)
    assert torch.equal(whitened.ground_truth, expected.ground_truth)


def test_devices_without_float64_use_the_cpu() -> None:
    assert whitening._float64_device(torch.device("mps", 0)) == torch.device("cpu")
    assert whitening._float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_unknown_space() -> None:
    with pytest.raises(ValueError, match=r"'token' is unknown.*'feature', 'sample'"):
        whiten(torch.zeros(2, 4), torch.zeros(4), space="token")


@pytest.mark.parametrize("tolerance", [0.0, -1e-5, 1e-9, 1.0, float("nan")])
def test_tolerance_that_makes_no_sense(tolerance: float) -> None:
    with pytest.raises(ValueError, match=f"whitening_tolerance={tolerance} must"):
        whiten(torch.zeros(2, 4), torch.zeros(4), tolerance=tolerance)


@pytest.mark.parametrize(
    ("generated", "ground_truth"),
    [((4,), (4,)), ((3, 2, 4), (4,)), ((3, 2, 4), (2, 4)), ((2, 4), (5,)), ((3, 2, 4), (3, 2, 4))],
)
def test_shapes_that_do_not_fit(generated: tuple[int, ...], ground_truth: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(\.\.\., n, D\)"):
        whiten(torch.zeros(generated), torch.zeros(ground_truth))
