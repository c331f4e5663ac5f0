"""Folded gradients: exact where nothing is folded, right on average where something is."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from hf_ebft.preflight.sketch import GradientSketch, fold


def fold_by_loop(values: Tensor, size: int, offset: int) -> Tensor:
    into = torch.zeros(size)
    for place, value in enumerate(values):
        into[(offset + place) % size] += value
    return into


@pytest.mark.parametrize("size", [1, 3, 7, 20, 50])
@pytest.mark.parametrize("offset", [0, 2, 6, 23])
@pytest.mark.parametrize("length", [1, 5, 20])
def test_folding_is_the_loop(size: int, offset: int, length: int) -> None:
    values = torch.randn(length)
    into = torch.zeros(size)
    fold(values, into, offset)
    torch.testing.assert_close(into, fold_by_loop(values, size, offset))


def test_products_are_right_on_average_over_all_signs() -> None:
    first, second = torch.randn(2, 8, dtype=torch.float64)
    products = []
    for signs in itertools.product((-1.0, 1.0), repeat=8):
        kept = torch.zeros(2, 3, dtype=torch.float64)
        for row, gradient in zip(kept, (first, second), strict=True):
            fold(gradient * torch.tensor(signs, dtype=torch.float64), row, 0)
        products.append(kept[0] @ kept[1])
    torch.testing.assert_close(torch.stack(products).mean(), first @ second)


def weights_with_gradients(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (4, 25))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    return weights


def flat(weights: list[nn.Parameter]) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])


def test_gradients_that_fit_are_kept_as_they_are() -> None:
    weights = weights_with_gradients(0)
    expected = flat(weights)
    sketch = GradientSketch(weights, most=1000)
    assert sketch.exact
    assert torch.equal(sketch.take(), expected)
    assert all(weight.grad is None for weight in weights), "they are cleared"


def test_a_weight_without_gradient_counts_as_zero() -> None:
    weights = weights_with_gradients(0)
    weights[1].grad = None
    expected = torch.cat([weights[0].grad.flatten(), torch.zeros(7), weights[2].grad.flatten()])
    assert torch.equal(GradientSketch(weights, most=1000).take(), expected)


def test_longer_gradients_keep_their_products_up_to_the_stated_error() -> None:
    size, errors = 40, []
    first, second = weights_with_gradients(1), weights_with_gradients(2)
    a, b = flat(first), flat(second)
    for seed in range(200):
        kept = []
        for weights, values in ((first, a), (second, b)):
            parts = values.split([weight.numel() for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.grad = part.view(weight.shape).clone()
            kept.append(GradientSketch(weights, size, seed).take())
        assert kept[0].shape == (size,)
        errors.append(float((kept[0] @ kept[1] - a @ b) / (a.norm() * b.norm())))
    found = torch.tensor(errors)
    bound = (2 / size) ** 0.5
    assert float(found.mean().abs()) < 4 * bound / 200**0.5
    assert 0.3 * bound < float(found.std()) < 1.2 * bound
