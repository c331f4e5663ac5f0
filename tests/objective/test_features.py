"""Normalisation and pooling against figures by hand, and by the norms that they must keep."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_ebft.config import EMBED_METHODS, FEATURE_NORMALIZATIONS, STRIDED_EMBED_METHODS
from hf_ebft.objective.features import normalize_layers, pool, token_positions


def random_layers(m: int, *shape: int) -> list[Tensor]:
    """Layers of very different sizes, as in real models."""
    return [torch.randn(*shape) * 10.0**i for i in range(m)]


def test_per_layer_normalization_by_hand() -> None:
    layers = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -500.0]])]
    features = normalize_layers(layers, "per_layer")
    expected = torch.tensor([[0.6, 0.8, 0.0, -1.0]]) / math.sqrt(2)
    torch.testing.assert_close(features, expected)


def test_joint_normalization_by_hand() -> None:
    layers = [torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.0]])]
    features = normalize_layers(layers, "joint")
    torch.testing.assert_close(features, torch.tensor([[1.0, 2.0, 2.0, 0.0]]) / 3)


def test_per_layer_is_the_default() -> None:
    layers = random_layers(3, 2, 5)
    torch.testing.assert_close(normalize_layers(layers), normalize_layers(layers, "per_layer"))


@pytest.mark.parametrize("normalization", FEATURE_NORMALIZATIONS)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_token_features_have_unit_norm(normalization: str, m: int) -> None:
    features = normalize_layers(random_layers(m, 2, 3, 4, 7), normalization)
    assert features.shape == (2, 3, 4, m * 7)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 3, 4))


def test_the_scale_of_a_layer_matters_only_with_joint_normalization() -> None:
    layers = random_layers(2, 3, 6)
    louder = [layers[0] * 1000, layers[1]]
    torch.testing.assert_close(normalize_layers(louder), normalize_layers(layers))
    assert not torch.allclose(normalize_layers(louder, "joint"), normalize_layers(layers, "joint"))


@pytest.mark.parametrize("normalization", FEATURE_NORMALIZATIONS)
def test_a_stacked_tensor_counts_layers_first(normalization: str) -> None:
    layers = random_layers(3, 2, 4)
    stacked = normalize_layers(torch.stack(layers), normalization)
    torch.testing.assert_close(stacked, normalize_layers(layers, normalization))


@pytest.mark.parametrize("normalization", FEATURE_NORMALIZATIONS)
def test_zero_states_stay_zero(normalization: str) -> None:
    features = normalize_layers([torch.zeros(2, 4), torch.zeros(2, 4)], normalization)
    assert torch.equal(features, torch.zeros(2, 8))


@pytest.mark.parametrize("normalization", FEATURE_NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_normalized_in_float32(
    normalization: str, dtype: torch.dtype
) -> None:
    # The squares of 300 overflow float16.
    layers = [(300 * torch.randn(5, 64)).to(dtype), torch.randn(5, 64).to(dtype)]
    features = normalize_layers(layers, normalization)
    assert features.dtype == torch.float32
    expected = normalize_layers([layer.float() for layer in layers], normalization)
    assert torch.equal(features, expected)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))


def test_unknown_normalization() -> None:
    with pytest.raises(ValueError, match=r"'layerwise'.*'per_layer', 'joint'"):
        normalize_layers(random_layers(2, 3, 4), "layerwise")


def test_no_layers() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        normalize_layers([])


def test_layers_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"one shape.*\(3, 4\).*\(2, 4\)"):
        normalize_layers([torch.zeros(3, 4), torch.zeros(2, 4)])


@pytest.mark.parametrize(
    ("embed_method", "length", "positions"),
    [
        ("last_token", 1, [0]),
        ("last_token", 8, [7]),
        ("mean_pooling", 3, [0, 1, 2]),
        ("concat", 8, [2, 4, 6]),
        ("concat", 5, [1, 2, 3]),
        ("concat", 3, [0, 1, 2]),
        ("concat", 2, [0, 1, 1]),
        ("concat", 1, [0, 0, 0]),
    ],
)
def test_token_positions(embed_method: str, length: int, positions: list[int]) -> None:
    assert token_positions(embed_method, length) == positions


@settings(deadline=None)  # machines may be busy
@given(embed_method=st.sampled_from(STRIDED_EMBED_METHODS), length=st.integers(1, 300))
def test_token_positions_are_ascending_places_of_the_block(embed_method: str, length: int) -> None:
    positions = token_positions(embed_method, length)
    assert positions == sorted(positions)
    assert all(position in range(length) for position in positions)


def test_pool_last_token() -> None:
    tokens = torch.randn(2, 3, 6, 5)
    kept = tokens[..., token_positions("last_token", 6), :]
    assert torch.equal(pool(kept, "last_token"), tokens[:, :, 5])


def test_pool_mean() -> None:
    tokens = torch.randn(2, 3, 6, 5)
    kept = tokens[..., token_positions("mean_pooling", 6), :]
    expected = sum(tokens[:, :, t] for t in range(6)) / 6
    torch.testing.assert_close(pool(kept, "mean_pooling"), expected)


def test_pool_concat() -> None:
    tokens = torch.randn(2, 3, 8, 5)
    kept = tokens[..., token_positions("concat", 8), :]
    pooled = pool(kept, "concat")
    assert pooled.shape == (2, 3, 15)
    for place, position in enumerate([2, 4, 6]):
        part = pooled[..., 5 * place : 5 * (place + 1)]
        torch.testing.assert_close(part, tokens[:, :, position] / math.sqrt(3))


@settings(deadline=None)  # machines may be busy
@given(
    embed_method=st.sampled_from(STRIDED_EMBED_METHODS),
    normalization=st.sampled_from(FEATURE_NORMALIZATIONS),
    length=st.integers(1, 9),
    m=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_block_features_have_at_most_unit_norm(
    embed_method: str, normalization: str, length: int, m: int, seed: int
) -> None:
    """Whatever the settings, so that rewards keep their scale; exactly 1 but for the mean."""
    hidden = torch.randn(m, 4, length, 6, generator=torch.Generator().manual_seed(seed))
    tokens = normalize_layers(hidden, normalization)[:, token_positions(embed_method, length)]
    norms = pool(tokens, embed_method).norm(dim=-1)
    assert norms.max() <= 1 + 1e-6
    if embed_method != "mean_pooling":
        torch.testing.assert_close(norms, torch.ones(4))


def test_completion_mean_is_for_structured_mode() -> None:
    assert set(EMBED_METHODS) - set(STRIDED_EMBED_METHODS) == {"completion_mean"}
    valid = "structured mode only.*'last_token', 'mean_pooling', 'concat'"
    with pytest.raises(ValueError, match=valid):
        token_positions("completion_mean", 8)
    with pytest.raises(ValueError, match=valid):
        pool(torch.zeros(2, 8, 4), "completion_mean")


def test_unknown_embed_method() -> None:
    with pytest.raises(ValueError, match=r"'first_token' is unknown.*'last_token'"):
        token_positions("first_token", 8)
    with pytest.raises(ValueError, match=r"'first_token' is unknown.*'last_token'"):
        pool(torch.zeros(2, 1, 4), "first_token")


@pytest.mark.parametrize("length", [0, -1])
def test_empty_block(length: int) -> None:
    with pytest.raises(ValueError, match=f"length={length}"):
        token_positions("last_token", length)


@pytest.mark.parametrize(
    ("embed_method", "n_tokens"),
    [("last_token", 2), ("last_token", 0), ("concat", 2), ("concat", 8), ("mean_pooling", 0)],
)
def test_pool_refuses_other_numbers_of_positions(embed_method: str, n_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"{embed_method}.*got {n_tokens} .*token_positions"):
        pool(torch.zeros(3, n_tokens, 4), embed_method)
